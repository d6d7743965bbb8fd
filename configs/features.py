"""Writes the frozen features of a checkpoint's encoder to disk, for other programs.

    python main.py --config=configs/features.py --config.init_from=runs/digits

WORKDIR gets {train,eval}_features.npy, float32 [images, width], and {train,eval}_labels.npy. The data are the
checkpoint's, or those of data.name (with data.path, data.train_split, data.eval_split). Settings that matter:
evaluate.token. An image folder without splits is taken whole: eval_features.npy has all of it.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "features"
    config.data.name = None  # the checkpoint's
    config.evaluate.max_train_examples = None  # all
    return config
