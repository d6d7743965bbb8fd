"""Writes a checkpoint's frozen features: {train,eval}_features.npy, float32 [images, width], {train,eval}_labels.npy.

python main.py --config=configs/features.py --config.init_from=runs/digits [--config.evaluate.token=class]"""

from configs import common


def get_config():
    config = common.of_checkpoint("features")
    config.evaluate.max_train_examples = None  # all
    return config
