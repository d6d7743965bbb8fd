"""The nearest pictures of an index to each query: neighbours.csv, neighbours.png and a page to look through.

python main.py --config=configs/retrieve.py --config.init_from=runs/digits [--config.retrieve.queries=PICTURES]"""

from configs import common


def get_config():
    config = common.of_checkpoint("retrieve")
    config.evaluate.max_train_examples = None  # all
    return config
