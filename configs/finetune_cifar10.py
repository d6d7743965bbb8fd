"""Fine-tunes an encoder of cifar10.py (docs/results.md); without init_from, trains the same network from scratch.

python main.py --config=configs/finetune_cifar10.py --config.init_from=runs/cifar10 --config.data.path=DATA_DIR"""

from configs import cifar10, finetune


def get_config():
    config = finetune.use_recipe(cifar10.get_config())
    config.data.update(batch_size=128, crop_scale=(0.6, 1.0), crop_ratio=(3 / 4, 4 / 3))
    return config
