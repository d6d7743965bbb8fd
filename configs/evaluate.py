"""Measures an autoencoder (loss, reconstructions) or a classifier (accuracy, each class) on its evaluation images.

python main.py --config=configs/evaluate.py --config.init_from=runs/digits"""

from configs import common


def get_config():
    return common.of_checkpoint("evaluate")
