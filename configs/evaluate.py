"""Measures an autoencoder or a classifier on its evaluation images, each once.

    python main.py --config=configs/evaluate.py --config.init_from=runs/digits

Autoencoder: the masked loss and reconstructions. Classifier: loss, top-1, top-5, classes.csv (recall and precision of
each class), confusion_matrix.png; classes are matched by name. An image folder without splits is evaluated entirely.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "evaluate"
    config.data.name = None  # the checkpoint's
    return config
