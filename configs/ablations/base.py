"""The common part of the ablations: the base that is pre-trained, and the protocols that measure it.

Every ablation takes a base after a colon (the digits if there is none):

    python main.py --config=configs/ablations/mask_ratio.py:vit_large --config.data.path=DATA_DIR"""

import importlib

from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import get
from mae_jax.settings.registry import nearest

# Pre-training itself measures bases without protocols, at its end: by k-NN and a logistic regression.
PROTOCOLS = dict.fromkeys(("digits", "image_folder", "vit_small"), ())
for _name in ("cifar10", "vit_base", "vit_large", "vit_huge"):
    PROTOCOLS[_name] = (("finetune", f"finetune_{_name}", ()), ("linear_probe", f"linear_probe_{_name}", ()))


def begin(base: str):
    """A base's config with the task ablate, its protocols and scores, but no grid. UserError for an unknown base."""
    if base not in PROTOCOLS:
        raise UserError(f"unknown base {base!r}{nearest(base, PROTOCOLS)}; there are: {', '.join(PROTOCOLS)}")
    config = importlib.import_module(f"configs.{base}").get_config()
    config.task = "ablate"
    config.model.normalize_targets = False  # as in the paper's ablations, except one row of Table 1d
    if base == "digits":  # a grid takes minutes: a sixth of the quickstart's length
        config.train.epochs = 30.0
        config.model.scan_unroll = 1  # short runs gain more from compiling less
        config.evaluate.random_encoder = False  # the same in every cell
        config.ablate.seeds = (0, 1)
    finetuned = ("finetune/top1",) if PROTOCOLS[base] else ()
    scores = ("linear_probe/top1", *finetuned, "knn/top1", "rankme", "eval/loss")
    config.ablate.update(measure=PROTOCOLS[base], scores=scores, plot=scores[:2])
    return config


def vary(config, axis: tuple | dict, title: str, paper: tuple = (), source: str = ""):
    """Sets the grid, (key, values) or {row's name: settings other than the base's}, and the plot; returns config."""
    if isinstance(axis, dict):
        keys = tuple(dict.fromkeys(key for row in axis.values() for key in row))
        values = tuple(tuple(row.get(key, get(config, key)) for key in keys) for row in axis.values())
        axis = (keys, values, tuple(axis))
    config.ablate.update(grid=(axis,), title=title, paper=paper, source=f"He et al. 2021, {source}" if source else "")
    return config


def curves(xs: tuple, finetuned: tuple, probed: tuple) -> tuple:
    """The paper's top-1 in percent, after fine-tuning and of linear probes."""
    ys = {"linear probing": probed, "fine-tuning": finetuned}
    return tuple((name, tuple(zip(xs, values, strict=True))) for name, values in ys.items())
