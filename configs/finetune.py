"""Fine-tunes the encoder of any checkpoint on any labelled pictures, its own if no others are named.

    python main.py --config=configs/finetune.py --config.init_from=runs/mine
    python main.py --config=configs/finetune.py --config.init_from=runs/mine --config.data.path=FOLDER
    python main.py --config=configs/finetune.py --config.init_from=FILE --config.data.name=image_folder \\
        --config.data.path=FOLDER

The encoder's sizes, the pictures' size, mean and std are the checkpoint's; the batch follows the number of pictures,
and the rate the batch. `--config.classifier.random_encoder=True` trains the same network from scratch. Regularisation
is as in finetune_cifar10.py.
"""

import ml_collections

from configs import common


def get_config() -> ml_collections.ConfigDict:
    config = common.get_config()
    config.task = "classify"
    config.classifier.update(pool="mean_norm", drop_path=0.1, label_smoothing=0.1)
    config.data.update(name=None, batch_size=None, crop_scale=(0.4, 1.0), mixup=0.8, cutmix=1.0)
    config.train.update(epochs=50.0, log_every_steps=20)
    config.optimizer.update(
        base_learning_rate=2e-3, min_learning_rate=1e-6, warmup_epochs=5.0, b2=0.999, layer_decay=0.75
    )
    return config
