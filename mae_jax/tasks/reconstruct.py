"""Reconstructions: draw what a checkpoint predicts for given pictures, and measure its loss on them."""

from pathlib import Path

import ml_collections

from mae_jax.data.datasets import make_source
from mae_jax.data.image_folder import PictureFiles
from mae_jax.models.classifier import is_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.evaluate import evaluate_autoencoder
from mae_jax.tasks.measuring import open_checkpoint


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Draws the pictures of `data.path`, if it is set, otherwise evaluation images of the checkpoint's own data.

    Raises:
      UserError: without a checkpoint of an autoencoder, or without pictures.
    """
    pictures = config.data.path
    config.data.path = None
    weights, config = open_checkpoint(config, workdir, needs_data=not pictures)
    if is_classifier(weights.config):
        raise UserError(f"init_from={config.init_from} is a classifier, which has no decoder: nothing to reconstruct")
    if pictures:
        source = PictureFiles(pictures)
        config.data.name, config.data.path = None, pictures  # for the result
    else:
        source = make_source(config.data, "eval", MAEConfig(**config.model).image_size, config.model.channels)
    evaluate_autoencoder(weights, config, workdir, None, source)
