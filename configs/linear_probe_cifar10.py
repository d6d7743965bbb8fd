"""Linear probe of an encoder that was pre-trained by cifar10.py.

    python main.py --config=configs/linear_probe_cifar10.py --config.init_from=runs/cifar10 --config.data.path=DATA_DIR

Nothing happens to the pictures, so the frozen encoder's features are computed once. Without init_from the encoder's
weights are random.
"""

import ml_collections

from configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.task = "classify"
    config.classifier.update(pool="mean", trained_blocks=0.0, batch_norm=True, head_std=0.01)
    config.data.update(batch_size=512, crop_rule="centre", flip=False)
    config.train.epochs = 90.0
    # The peak rate is then 6.4, as in the paper, whose batch is 16384: LARS sets its updates by the weights' norm.
    config.optimizer.update(name="lars", base_learning_rate=3.2, warmup_epochs=10.0, weight_decay=0.0)
    return config
