"""Fine-tuning only the last blocks (He et al. 2021, Figure 9).

    python main.py --config=configs/ablations/partial_finetuning.py                              # the digits
    python main.py --config=configs/ablations/partial_finetuning.py:vit_large --config.data.path=DATA_DIR

All cells of a seed share one pre-training. The paper, with ViT-L on ImageNet: 73.5 % where only the head learns, 81.0 %
with one block, 84.2 % with four, 84.9 % with all 24; MoCo v3, whose linear probe is better, gains less.
"""

import ml_collections

from configs.ablations import base as bases
from mae_jax.runtime.errors import UserError

KEY = "finetune.classifier.trained_blocks"
BLOCKS = (1, 2, 4, 6, 12, 18, 24, 32)
PAPER = (73.5, 79.1, 81.0, 83.1, 84.2, 84.4, 84.6, 84.7, 84.9)
MOCO = (77.6, 79.9, 80.8, 81.6, 81.9, 83.2, 83.8, 84.1)


def names(depth: int) -> tuple[str, ...]:
    numbers = (f"{blocks} block{'s' * (blocks > 1)}" for blocks in BLOCKS if blocks < depth)
    return ("the head", "half a block", *numbers, "everything")


def get_config(base: str = "digits") -> ml_collections.ConfigDict:
    config = bases.begin(base)
    depth = config.model.depth
    if base == "digits":  # a tenth of the labels, since with all of them little is left to tell encoders apart by
        overrides = (("data.label_fraction", 0.1), ("train.epochs", 100.0), ("model.scan_unroll", 1))
        config.ablate.measure = (("finetune", "finetune_digits", overrides),)
    measure = tuple(protocol for protocol in config.ablate.measure if protocol[0] == "finetune")
    if not measure:
        raise UserError(f"base {base!r} has no protocol for fine-tuning: take another, or set ablate.measure yourself")
    blocks = (0.0, 0.5, *(float(blocks) for blocks in BLOCKS if blocks < depth), None)
    paper, whole = names(24), [name for name in names(24) if name != "half a block"]
    config.ablate.update(
        grid=((KEY, blocks, names(depth)),),
        measure=measure,
        scores=("finetune/top1",),
        plot=("finetune/top1",),
        paper=(
            ("MAE, fine-tuned blocks", tuple(zip(paper, PAPER, strict=True))),
            ("MoCo v3, fine-tuned blocks", tuple(zip(whole, MOCO, strict=True))),
        ),
        title="partial fine-tuning",
        source="He et al. 2021, Figure 9",
    )
    return config
