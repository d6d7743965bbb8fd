"""Linear probe of ViT-B/16 on ImageNet-1k with the paper's recipe (A.1 and Table 10). Not run here.

    python main.py --config=configs/linear_probe_vit_base.py --config.init_from=runs/vit_base --config.data.path=DATA

The authors report 68.0 % (67.8 % for the released weights). Here BatchNorm's statistics are those of the whole batch,
not of 512 images on each GPU. For ViT-L and ViT-H the authors find 50 epochs enough."""

from configs import common, linear_probe


def get_config(size: str = "base"):
    config = linear_probe.use_recipe(common.vit(size))
    config.classifier.pool = "class"
    config.data.update(batch_size=16384, crop_scale=(0.08, 1.0), crop_rule="clip", flip=True)
    config.train.log_every_steps = 50
    config.optimizer.base_learning_rate = 0.1
    config.evaluate.every_steps = 780  # ten epochs
    return config
