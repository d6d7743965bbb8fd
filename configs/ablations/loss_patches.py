"""Whether the loss counts the hidden patches or all (He et al. 2021, section 3).

    python main.py --config=configs/ablations/loss_patches.py[:BASE]

The paper (ViT-L, ImageNet): on all patches, fine-tuning loses about half a point.
"""

from configs.ablations import base as bases


def get_config(base: str = "digits"):
    return bases.vary(bases.begin(base), ("model.loss_patches", ("hidden", "all")), "patches that the loss counts")
