"""Linear probe of ViT-H/14 on ImageNet-1k.

    python main.py --config=configs/linear_probe_vit_huge.py --config.init_from=runs/vit_huge \\
        --config.data.path=DATA_DIR

The recipe of linear_probe_vit_base.py; the authors report 76.6 % (77.2 %), and that 50 epochs are enough. Written
for accelerators, in bfloat16; not run here.
"""

import ml_collections

from configs import linear_probe_vit_base
from mae_jax.models.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    config = linear_probe_vit_base.get_config()
    config.model.update(SIZES["huge"])
    return config
