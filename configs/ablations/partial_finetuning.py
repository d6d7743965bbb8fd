"""Fine-tuning only the last blocks (He et al. 2021, Figure 9); all cells of a seed share one pre-training.

python main.py --config=configs/ablations/partial_finetuning.py[:BASE]
"""

from configs.ablations import base as bases
from mae_jax.runtime.errors import UserError

BLOCKS = (1, 2, 4, 6, 12, 18, 24, 32)
MAE = (73.5, 79.1, 81.0, 83.1, 84.2, 84.4, 84.6, 84.7, 84.9)
MOCO = (77.6, None, 79.9, 80.8, 81.6, 81.9, 83.2, 83.8, 84.1)


def names(depth: int) -> tuple[str, ...]:
    numbers = (f"{blocks} block{'s' * (blocks > 1)}" for blocks in BLOCKS if blocks < depth)
    return ("the head", "half a block", *numbers, "everything")


def paper_curve(name: str, accuracies: tuple) -> tuple:
    points = zip(names(24), accuracies, strict=True)
    return (f"{name}, fine-tuned blocks", tuple(point for point in points if point[1] is not None))


def get_config(base: str = "digits"):
    config = bases.begin(base)
    depth = config.model.depth
    if base == "digits":  # with all labels, encoders hardly differ
        overrides = (("data.label_fraction", 0.1), ("train.epochs", 100.0), ("model.scan_unroll", 1))
        config.ablate.measure = (("finetune", "finetune_digits", overrides),)
    measure = config.ablate.measure[:1]
    if not measure:
        raise UserError(f"base {base!r} has no protocol for fine-tuning: take another, or set ablate.measure yourself")
    config.ablate.update(measure=measure, scores=("finetune/top1",), plot=("finetune/top1",))
    blocks = (0.0, 0.5, *(float(blocks) for blocks in BLOCKS if blocks < depth), None)
    axis = ("finetune.classifier.trained_blocks", blocks, names(depth))
    paper = (paper_curve("MAE", MAE), paper_curve("MoCo v3", MOCO))
    return bases.vary(config, axis, "partial fine-tuning", paper, "Figure 9")
