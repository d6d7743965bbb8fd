"""Fine-tunes ViT-B/16 on ImageNet-1k with the recipe of the released models. Not run here.

    python main.py --config=configs/finetune_vit_base.py --config.init_from=runs/vit_base --config.data.path=DATA_DIR

Values of the authors' FINETUNE.md (github.com/facebookresearch/mae), not of the paper's Table 9; they report 83.6 %.
Mixup and cutmix draw a weight for each pair of pictures, not for each batch."""

from configs import common, finetune


def get_config():
    config = finetune.use_recipe(common.vit("base"))
    config.data.update(batch_size=1024, crop_scale=(0.08, 1.0), augmentation="rand_augment", erasing=0.25)
    config.train.epochs = 100.0
    config.optimizer.update(base_learning_rate=5e-4, layer_decay=0.65)
    config.evaluate.every_steps = 1251  # an epoch
    return config
