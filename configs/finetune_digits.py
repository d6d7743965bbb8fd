"""Fine-tunes the quickstart's encoder on the digits' labels.

    python main.py --config=configs/finetune_digits.py --config.init_from=runs/digits

Without init_from the same network is trained from scratch.
"""

import ml_collections

from configs import digits


def get_config() -> ml_collections.ConfigDict:
    config = digits.get_config()
    config.task = "classify"
    config.classifier.update(pool="mean_norm", drop_path=0.1, label_smoothing=0.1)
    config.data.update(crop_scale=(0.6, 1.0), crop_ratio=(3 / 4, 4 / 3), mixup=0.8, cutmix=1.0)
    config.train.update(epochs=50.0, log_every_steps=200)
    config.optimizer.update(
        base_learning_rate=4e-3, b2=0.999, warmup_epochs=5.0, min_learning_rate=1e-6, layer_decay=0.75
    )
    return config
