"""Linear probe of ViT-B/16 on ImageNet-1k: class token, BatchNorm, linear layer (paper, A.1 and Table 10).

    python main.py --config=configs/linear_probe_vit_base.py --config.init_from=runs/vit_base \\
        --config.data.path=DATA_DIR

The authors report 68.0 % (67.8 % for the released weights). BatchNorm's statistics are the whole batch's, not those of
512 images on each GPU. For accelerators; not run here.
"""

from configs import common, linear_probe


def get_config(size: str = "base"):
    config = linear_probe.use_recipe(common.vit(size))
    config.classifier.pool = "class"
    config.data.update(batch_size=16384, crop_scale=(0.08, 1.0), crop_rule="clip", flip=True)
    config.train.log_every_steps = 50
    config.optimizer.base_learning_rate = 0.1
    config.evaluate.every_steps = 780  # ten epochs
    return config
