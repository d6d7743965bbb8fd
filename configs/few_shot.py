"""Top-1 of least squares on 5 and 10 training images of each class, from a checkpoint's frozen features.

python main.py --config=configs/few_shot.py --config.init_from=runs/digits [--config.evaluate.shots='(1, 5, 10, 25)']"""

from configs import common


def get_config():
    config = common.of_checkpoint("few_shot")
    config.evaluate.max_train_examples = None  # all
    return config
