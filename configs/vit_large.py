"""ViT-L/16 on ImageNet-1k through TFDS: the paper's pre-training recipe (Table 8).

    python main.py --config=configs/vit_large.py --config.data.path=DATA_DIR --workdir=runs/vit_large

The paper's 800 epochs: 85.4 % fine-tuned, 73.9 % linear probe (Table 1d), in about 42 hours on 64 V100
(github.com/facebookresearch/mae, PRETRAIN.md); 15.4 hours on 128 TPU-v3 cores (Table 2).
Written for accelerators, in bfloat16; not run to its end here.
"""

import ml_collections

from configs import common
from mae_jax.models.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model.update(SIZES["large"])
    return config
