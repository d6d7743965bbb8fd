"""k-NN on the frozen features of a checkpoint's encoder, for every pair of k and temperature.

    python main.py --config=configs/knn.py --config.init_from=runs/digits [--config.data.label_fraction=0.1]

All pictures of an image folder without splits are classified, with the checkpoint's training pictures as neighbours if
they have the same classes. data.eval_fraction=0.1 instead holds out a tenth of the folder and learns from the rest.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.task = "knn"
    config.data.name = None  # the checkpoint's
    config.evaluate.max_train_examples = None  # all
    return config
