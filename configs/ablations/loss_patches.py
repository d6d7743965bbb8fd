"""Whether the loss counts the hidden patches or all (He et al. 2021, section 3).

    python main.py --config=configs/ablations/loss_patches.py                              # the digits
    python main.py --config=configs/ablations/loss_patches.py:vit_large --config.data.path=DATA_DIR

The paper, with ViT-L on ImageNet: on all pixels instead of the hidden ones alone, about half a point less.
"""

import ml_collections

from configs.ablations import base as bases


def get_config(base: str = "digits") -> ml_collections.ConfigDict:
    config = bases.begin(base)
    config.ablate.update(grid=(("model.loss_patches", ("hidden", "all")),), title="patches that the loss counts")
    return config
