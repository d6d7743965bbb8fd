"""k-NN on the frozen features of a checkpoint's encoder, for every pair of k and temperature.

    python main.py --config=configs/knn.py --config.init_from=runs/digits

The data are the checkpoint's, or those of data.name (with data.path, data.train_split, data.eval_split). An image
folder without splits is measured whole, beside the checkpoint's own training pictures, if these have the same classes;
data.eval_fraction=0.1 holds a tenth of it out instead and learns from the others. Settings that matter:
evaluate.token, knn_k, knn_temperature, knn_sweep_k, knn_sweep_temperature; data.label_fraction.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "knn"
    config.data.name = None  # the checkpoint's
    config.evaluate.max_train_examples = None  # all
    return config
