"""Fine-tunes an encoder that cifar10.py has pre-trained.

    python main.py --config=configs/finetune_cifar10.py --config.init_from=runs/cifar10 --config.data.path=DATA_DIR

Without init_from it trains the same network from scratch. docs/results.md has what was measured.
"""

from configs import cifar10, finetune


def get_config():
    config = finetune.use_recipe(cifar10.get_config())
    config.data.update(batch_size=128, crop_scale=(0.6, 1.0), crop_ratio=(3 / 4, 4 / 3))
    return config
