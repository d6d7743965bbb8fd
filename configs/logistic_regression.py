"""Logistic regression on the frozen features of a checkpoint's encoder, for several strengths of its penalty.

    python main.py --config=configs/logistic_regression.py --config.init_from=runs/digits

The data are those of knn.py. Settings that matter: evaluate.token, probe_c, probe_sweep_c; data.label_fraction.
"""

from configs import knn


def get_config():
    config = knn.get_config()
    config.task = "logistic_regression"
    return config
