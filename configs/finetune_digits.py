"""Fine-tunes the quickstart's encoder on the digits' labels; without init_from, trains the same network from scratch.

python main.py --config=configs/finetune_digits.py --config.init_from=runs/digits"""

from configs import digits, finetune


def get_config():
    config = finetune.use_recipe(digits.get_config())
    config.data.update(crop_scale=(0.6, 1.0), crop_ratio=(3 / 4, 4 / 3))
    return config
