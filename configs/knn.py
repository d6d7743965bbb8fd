"""k-NN on the frozen features of a checkpoint's encoder, for every pair of k and temperature.

python main.py --config=configs/knn.py --config.init_from=runs/digits [--config.data.label_fraction=0.1]"""

from configs import common


def get_config():
    config = common.of_checkpoint("knn")
    config.evaluate.max_train_examples = None  # all
    return config
