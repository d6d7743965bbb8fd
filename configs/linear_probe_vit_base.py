"""Linear probe of ViT-B/16 on ImageNet-1k: the frozen encoder's class token, BatchNorm, a linear layer (paper, A.1).

    python main.py --config=configs/linear_probe_vit_base.py --config.init_from=runs/vit_base \\
        --config.data.path=DATA_DIR

The recipe of the paper's Table 10 and the authors' code, with which they report 68.0 % (67.8 % for the released
weights). BatchNorm's statistics are those of the whole batch, over all devices; the authors' are of 512 images on each
GPU. Written for accelerators, in bfloat16; not run here.
"""

import ml_collections

from configs import common
from mae_jax.models.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "classify"
    config.model.update(SIZES["base"])
    config.classifier.update(pool="class", trained_blocks=0.0, batch_norm=True, head_std=0.01)
    config.data.update(batch_size=16384, crop_scale=(0.08, 1.0), crop_rule="clip")
    config.train.epochs = 90.0
    config.optimizer.update(name="lars", base_learning_rate=0.1, warmup_epochs=10.0, weight_decay=0.0)
    config.evaluate.every_steps = 780  # ten epochs
    return config
