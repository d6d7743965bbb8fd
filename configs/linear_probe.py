"""Linear probe of any checkpoint's encoder on any labelled pictures; by default on those of its pre-training.

    python main.py --config=configs/linear_probe.py --config.init_from=runs/mine [--config.data.path=FOLDER]

BatchNorm and a linear layer learn from the mean patch token. Pictures are not augmented, so the frozen encoder's
features are computed once. `--config.classifier.random_encoder=True` probes random weights, for comparison."""

from configs import common


def use_recipe(config):
    """Applies the settings of all probes (paper, A.1) to a config; returns it."""
    config.task = "classify"
    config.classifier.update(pool="mean", trained_blocks=0.0, batch_norm=True, head_std=0.01)
    config.data.update(crop_rule="centre", flip=False)
    config.train.update(epochs=90.0, log_every_steps=100)
    # LARS scales its updates by the weights' norm, so the paper's peak rate of 6.4 serves smaller batches too.
    config.optimizer.update(name="lars", warmup_epochs=10.0, weight_decay=0.0)
    return config


def get_config():
    config = use_recipe(common.get_config())
    config.data.update(name=None, batch_size=None)
    # LARS at 6.4 needs ImageNet's number of steps and size of batch.
    config.optimizer.update(name="adamw", base_learning_rate=5e-2, b2=0.999)
    return config
