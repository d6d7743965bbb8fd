"""Fine-tunes an encoder that was pre-trained by cifar10.py on the labels of CIFAR-10.

    python main.py --config=configs/finetune_cifar10.py --config.init_from=runs/cifar10 --config.data.path=DATA_DIR

The encoder's sizes are the checkpoint's. Without init_from the same network is trained from scratch. docs/results.md
has what was measured.
"""

import ml_collections

from configs import cifar10


def get_config() -> ml_collections.ConfigDict:
    config = cifar10.get_config()
    config.task = "classify"
    config.classifier.update(pool="mean_norm", drop_path=0.1, label_smoothing=0.1)
    config.data.update(batch_size=128, crop_scale=(0.6, 1.0), crop_ratio=(3 / 4, 4 / 3), mixup=0.8, cutmix=1.0)
    config.train.epochs = 50.0
    config.optimizer.update(
        base_learning_rate=1e-3, min_learning_rate=1e-6, warmup_epochs=5.0, b2=0.999, layer_decay=0.75
    )
    return config
