"""ViT-S/16 on ImageNet-1k through TFDS: the paper's pre-training recipe (Table 8).

    python main.py --config=configs/vit_small.py --config.data.path=DATA_DIR --workdir=runs/vit_small

A size that the paper does not have; others report 49.7 % linear probe after 800 epochs
(github.com/TonyLianLong/CrossMAE, issue 4).
Written for accelerators, in bfloat16; not run to its end here.
"""

import ml_collections

from configs import common
from mae_jax.models.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.update(SIZES["small"])
    config.model.update(decoder_width=256, decoder_num_heads=8)  # a decoder no wider than the encoder
    return config
