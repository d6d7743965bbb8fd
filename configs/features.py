"""Writes the frozen features of a checkpoint's encoder to disk, for other programs.

    python main.py --config=configs/features.py --config.init_from=runs/digits [--config.evaluate.token=class]

Files: {train,eval}_features.npy, float32 [images, width], and {train,eval}_labels.npy. All pictures of an image folder
without splits go into eval_features.npy.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "features"
    config.data.name = None  # the checkpoint's
    config.evaluate.max_train_examples = None  # all
    return config
