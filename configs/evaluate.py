"""Measures a checkpoint on its evaluation images, each once: an autoencoder or a classifier.

    python main.py --config=configs/evaluate.py --config.init_from=runs/digits
    python main.py --config=configs/evaluate.py --config.init_from=runs/finetune_digits

Of an autoencoder: the masked loss, and pictures. Of a classifier: loss, top-1, top-5, classes.csv with each class's
recall and precision, and confusion_matrix.png. The data are the checkpoint's, or those of data.name (with data.path,
data.eval_split). An image folder without splits is measured whole; a classifier's classes are matched by their names.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "evaluate"
    config.data.name = None  # the checkpoint's
    return config
