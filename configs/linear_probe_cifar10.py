"""Linear probe of an encoder pre-trained with cifar10.py; without init_from, of random weights.

python main.py --config=configs/linear_probe_cifar10.py --config.init_from=runs/cifar10 --config.data.path=DATA_DIR"""

from configs import cifar10, linear_probe


def get_config():
    config = linear_probe.use_recipe(cifar10.get_config())
    config.train.log_every_steps = 50
    config.optimizer.base_learning_rate = 3.2
    return config
