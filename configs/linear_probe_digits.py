"""Linear probe of the quickstart's encoder on the digits' labels; without init_from, of random weights.

python main.py --config=configs/linear_probe_digits.py --config.init_from=runs/digits"""

from configs import digits, linear_probe


def get_config():
    config = linear_probe.use_recipe(digits.get_config())
    config.data.batch_size = 256
    config.optimizer.base_learning_rate = 6.4
    return config
