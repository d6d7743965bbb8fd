"""Linear probes of a frozen encoder for all layers, tokens and learning rates at once; held-out images choose the best.

python main.py --config=configs/probe_sweep.py --config.init_from=runs/digits [--config.evaluate.layers='((-1,),)']"""

from configs import common


def get_config():
    config = common.of_checkpoint("probe_sweep")
    config.evaluate.max_train_examples = None  # all
    return config
