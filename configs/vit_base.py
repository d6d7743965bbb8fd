"""ViT-B/16 on ImageNet-1k through TFDS: the paper's pre-training recipe (Table 8).

    python main.py --config=configs/vit_base.py --config.data.path=DATA_DIR --workdir=runs/vit_base

After 1,600 epochs the paper has 83.6 % fine-tuned (Table 3) and 68.0 % linear probe (Table 12). This config runs 800.
Written for accelerators, in bfloat16; not run to its end here.
"""

import ml_collections

from configs import common
from mae_jax.models.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.update(SIZES["base"])
    return config
