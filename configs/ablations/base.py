"""What the ablations begin with: the pre-training of a base, and the protocols that measure it.

Every file here takes the base after a colon, and is for the digits without one:

    python main.py --config=configs/ablations/mask_ratio.py:vit_large --config.data.path=DATA_DIR
"""

import importlib
from typing import Any

import ml_collections

from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import nearest
from mae_jax.settings.fields import get

# Of each base the protocols that fit it. Those without are measured by what pre-training does at its end by itself:
# k-NN and a logistic regression. On the digits that keeps a grid to minutes.
PROTOCOLS = {
    "digits": (),
    "cifar10": (("finetune", "finetune_cifar10", ()), ("linear_probe", "linear_probe_cifar10", ())),
    "image_folder": (),
    "vit_small": (),
    "vit_base": (("finetune", "finetune_vit_base", ()), ("linear_probe", "linear_probe_vit_base", ())),
    "vit_large": (("finetune", "finetune_vit_large", ()), ("linear_probe", "linear_probe_vit_large", ())),
    "vit_huge": (("finetune", "finetune_vit_huge", ()), ("linear_probe", "linear_probe_vit_huge", ())),
}


def begin(base: str) -> ml_collections.ConfigDict:
    """The settings of a base with the task ablate, its protocols and their scores; the grid is the caller's.

    Raises:
      UserError: for a base that is not known.
    """
    if base not in PROTOCOLS:
        raise UserError(f"unknown base {base!r}{nearest(base, PROTOCOLS)}; there are: {', '.join(PROTOCOLS)}")
    config = importlib.import_module(f"configs.{base}").get_config()
    config.task = "ablate"
    if base == "digits":  # minutes for a grid: a sixth of the quickstart's length
        config.train.epochs = 30.0
        config.model.scan_unroll = 1  # short runs gain more from compiling less
        config.evaluate.random_encoder = False  # it is the same in every cell
        config.ablate.seeds = (0, 1)
    # The paper's ablations are of pixels as they are, all but one row of Table 1d.
    config.model.normalize_targets = False
    measured = PROTOCOLS[base]
    others = tuple(f"{name}/top1" for name, _, _ in measured if name != "linear_probe")
    scores = ("linear_probe/top1", *others, "knn/top1", "rankme", "eval/loss")
    config.ablate.update(measure=measured, scores=scores, plot=scores[:2])
    return config


def named_rows(config: ml_collections.ConfigDict, rows: dict[str, dict[str, Any]]) -> tuple:
    """An axis of rows, each with a name and the settings in which it differs from the base."""
    keys = tuple(dict.fromkeys(key for row in rows.values() for key in row))
    values = (tuple(row.get(key, get(config, key)) for key in keys) for row in rows.values())
    return keys, tuple(values), tuple(rows)


def curves(xs: tuple, finetuned: tuple, probed: tuple) -> tuple:
    """The paper's top-1 after fine-tuning and of linear probes."""
    return (
        ("linear probing", tuple(zip(xs, probed, strict=True))),
        ("fine-tuning", tuple(zip(xs, finetuned, strict=True))),
    )
