"""Attentive probe of the encoder of any checkpoint on any labelled pictures, its own if no others are named.

    python main.py --config=configs/attentive_probe.py --config.init_from=runs/mine [--config.data.path=FOLDER]

As linear_probe.py, but a learned query pools the frozen encoder's patch tokens.
"""

import ml_collections

from configs import linear_probe


def get_config() -> ml_collections.ConfigDict:
    config = linear_probe.get_config()
    config.classifier.pool = "attentive"
    config.optimizer.update(base_learning_rate=1e-2, weight_decay=0.1)
    return config
