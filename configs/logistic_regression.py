"""Logistic regression on the frozen features of a checkpoint's encoder, for several strengths of its penalty.

    python main.py --config=configs/logistic_regression.py --config.init_from=runs/digits

The data are the checkpoint's, or those of data.name (with data.path, data.train_split, data.eval_split). An image
folder without splits is measured whole, beside the checkpoint's own training pictures, if these have the same classes;
data.eval_fraction=0.1 holds a tenth of it out instead and learns from the others. Settings that matter:
evaluate.token, probe_c, probe_sweep_c; data.label_fraction.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "logistic_regression"
    config.data.name = None  # the checkpoint's
    config.evaluate.max_train_examples = None  # all
    return config
