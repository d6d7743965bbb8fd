"""Fine-tunes ViT-B/16 on ImageNet-1k with the recipe of the released models.

    python main.py --config=configs/finetune_vit_base.py --config.init_from=runs/vit_base --config.data.path=DATA_DIR

Values are those of the authors' code (github.com/facebookresearch/mae, FINETUNE.md), which differ from Table 9 of the
paper; they report 83.6 % (mean of four seeds 83.57 %). Mixing draws its weight for each pair of pictures instead of
once for each batch. Written for accelerators, in bfloat16; not run here.
"""

import ml_collections

from configs import common
from mae_jax.models.config import SIZES


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "classify"
    config.model.update(SIZES["base"])
    config.classifier.update(pool="mean_norm", drop_path=0.1, label_smoothing=0.1)
    config.data.update(
        batch_size=1024, crop_scale=(0.08, 1.0), augmentation="rand_augment", erasing=0.25, mixup=0.8, cutmix=1.0
    )
    config.train.epochs = 100.0
    config.optimizer.update(
        base_learning_rate=5e-4, min_learning_rate=1e-6, warmup_epochs=5.0, b2=0.999, layer_decay=0.65
    )
    config.evaluate.every_steps = 1251  # an epoch
    return config
