"""Logistic regression on a checkpoint's frozen features, for several strengths of its penalty; data as for knn.py.

python main.py --config=configs/logistic_regression.py --config.init_from=runs/digits"""

from configs import common


def get_config():
    config = common.of_checkpoint("logistic_regression")
    config.evaluate.max_train_examples = None  # all
    return config
