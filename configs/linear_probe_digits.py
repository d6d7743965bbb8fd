"""Linear probe of the quickstart's encoder on the digits' labels, by stochastic gradient descent with LARS.

    python main.py --config=configs/linear_probe_digits.py --config.init_from=runs/digits

Nothing happens to the pictures, so the frozen encoder's features are computed once. Without init_from the encoder's
weights are random.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits.get_config()
    config.task = "classify"
    config.classifier.update(pool="mean", trained_blocks=0.0, batch_norm=True, head_std=0.01)
    config.data.crop_rule = "centre"
    config.data.batch_size = 256
    config.train.update(epochs=90.0, log_every_steps=100)
    # The peak rate is then 6.4, as in the paper, whose batch is 16384: LARS sets its updates by the weights' norm.
    config.optimizer.update(name="lars", base_learning_rate=6.4, warmup_epochs=10.0, weight_decay=0.0)
    return config
