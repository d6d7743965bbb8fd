"""Linear probe of the encoder of any checkpoint on any labelled pictures, its own if no others are named.

    python main.py --config=configs/linear_probe.py --config.init_from=runs/mine [--config.data.path=FOLDER]

BatchNorm and a linear layer learn from the mean of the frozen encoder's patch tokens. Nothing happens to the pictures,
so its output is computed once. The batch follows the number of pictures, and the rate the batch.
`--config.classifier.random_encoder=True` probes an encoder of this size with random weights, for comparison.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "classify"
    config.classifier.update(pool="mean", trained_blocks=0.0, batch_norm=True, head_std=0.01)
    config.data.update(name=None, batch_size=None, crop_rule="centre", flip=False)
    config.train.update(epochs=90.0, log_every_steps=100)
    # AdamW rather than LARS, whose rate of 6.4 is for as many steps of as large a batch as ImageNet's.
    config.optimizer.update(base_learning_rate=5e-2, warmup_epochs=10.0, b2=0.999, weight_decay=0.0)
    return config
