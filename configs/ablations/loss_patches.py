"""Whether the loss counts the hidden patches or all (He et al. 2021, section 3: all cost half a point fine-tuned).

python main.py --config=configs/ablations/loss_patches.py[:BASE]"""

from configs.ablations import base as bases


def get_config(base: str = "digits"):
    return bases.vary(bases.begin(base), ("model.loss_patches", ("hidden", "all")), "patches that the loss counts")
