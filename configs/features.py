"""Writes a checkpoint's frozen features, with names and labels of the pictures, to features.parquet (or .npy arrays).

python main.py --config=configs/features.py --config.init_from=runs/digits [--config.evaluate.token=class]"""

from configs import common


def get_config():
    config = common.of_checkpoint("features")
    config.evaluate.max_train_examples = None  # all
    return config
