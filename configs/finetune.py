"""Fine-tunes the encoder of any checkpoint on any labelled pictures; by default on those of its pre-training.

    python main.py --config=configs/finetune.py --config.init_from=runs/mine [--config.data.path=FOLDER]

The encoder and the pictures' size, mean and std are the checkpoint's; the batch follows from the number of pictures,
the rate from the batch. With a weight file of another program, add `--config.data.name=image_folder`.
`--config.classifier.random_encoder=True` trains the same network from scratch."""

from configs import common


def use_recipe(config):
    """Applies the settings of all fine-tuning (after the authors' FINETUNE.md) to a config; returns it."""
    config.task = "classify"
    config.classifier.update(pool="mean_norm", drop_path=0.1, label_smoothing=0.1)
    config.data.update(mixup=0.8, cutmix=1.0)
    config.train.epochs = 50.0
    config.optimizer.update(min_learning_rate=1e-6, warmup_epochs=5.0, b2=0.999, layer_decay=0.75)
    return config


def get_config():
    config = use_recipe(common.get_config())
    config.data.update(name=None, batch_size=None, crop_scale=(0.4, 1.0))
    config.train.log_every_steps = 20
    config.optimizer.base_learning_rate = 2e-3
    return config
