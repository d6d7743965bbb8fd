"""Logistic regression on a checkpoint's frozen features, for several strengths of its penalty; data as for knn.py.

python main.py --config=configs/logistic_regression.py --config.init_from=runs/digits
"""

from configs import knn


def get_config():
    config = knn.get_config()
    config.task = "logistic_regression"
    return config
