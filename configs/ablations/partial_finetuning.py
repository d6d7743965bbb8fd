"""Fine-tuning only the last blocks (He et al. 2021, Figure 9); all cells of a seed share one pre-training.

python main.py --config=configs/ablations/partial_finetuning.py[:BASE]"""

from configs.ablations import base as bases
from mae_jax.runtime.errors import UserError

MAE = (73.5, 79.1, 81.0, 83.1, 84.2, 84.4, 84.6, 84.7, 84.9)
MOCO = (77.6, None, 79.9, 80.8, 81.6, 81.9, 83.2, 83.8, 84.1)


def trained_blocks(depth: int) -> dict[str, float | None]:
    some = {f"{n} block{'s' * (n > 1)}": float(n) for n in (1, 2, 4, 6, 12, 18, 24, 32) if n < depth}
    return {"the head": 0.0, "half a block": 0.5} | some | {"everything": None}


def get_config(base: str = "digits"):
    config = bases.begin(base)
    if base == "digits":  # with all labels, encoders hardly differ
        overrides = (("data.label_fraction", 0.1), ("train.epochs", 100.0), ("model.scan_unroll", 1))
        config.ablate.measure = (("finetune", "finetune_digits", overrides),)
    if not config.ablate.measure:
        raise UserError(f"base {base!r} has no protocol for fine-tuning: take another, or set ablate.measure yourself")
    config.ablate.update(measure=config.ablate.measure[:1], scores=("finetune/top1",), plot=("finetune/top1",))
    blocks = trained_blocks(config.model.depth)
    axis = ("finetune.classifier.trained_blocks", tuple(blocks.values()), tuple(blocks))
    curves = {"MAE": zip(trained_blocks(24), MAE, strict=True), "MoCo v3": zip(trained_blocks(24), MOCO, strict=True)}
    paper = tuple((f"{name}, fine-tuned blocks", tuple(p for p in curve if p[1])) for name, curve in curves.items())
    return bases.vary(config, axis, "partial fine-tuning", paper, "Figure 9")
