"""Draws a checkpoint's reconstructions of pictures, and measures its loss on them."""

from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.data.image_folder import PictureFiles
from mae_jax.data.sources import Source, count_images
from mae_jax.interop.weights import has_decoder
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import find_sources, open_checkpoint, open_data, run_evaluators, write_measurement

NAMES = ("loss", "reconstructions")  # default evaluators


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Reconstructs the pictures in `data.path`, by default evaluation images of the checkpoint's own data."""
    pictures = config.data.path
    config.data.path = None
    weights, config = open_checkpoint(config, workdir, needs_data=not pictures)
    if is_classifier(weights.config):
        raise UserError(f"init_from={config.init_from} is a classifier, which has no decoder: nothing to reconstruct")
    if pictures:
        config.data.name, config.data.path = None, pictures  # for result.json
    source = PictureFiles(pictures) if pictures else find_sources(weights, config, to_train=False)[1]
    reconstruct(weights, config, workdir, None, source)


def reconstruct(weights: Weights, config: ConfigDict, workdir: Path, train: Source | None, evaluation: Source) -> None:
    """Measures an autoencoder's masked loss, and draws pictures."""
    names = config.evaluate.evaluators or NAMES
    if not has_decoder(weights) and not set(names).isdisjoint(NAMES):
        raise UserError(
            f"init_from={config.init_from} holds only an encoder: nothing can be reconstructed; give a file with its "
            "decoder (of the released ones mae_pretrain_vit_*_full or mae_visualize_vit_*)"
        )
    data, state = open_data(weights, config, train, evaluation)
    _, result = run_evaluators(names, data, state, workdir)
    write_measurement(workdir, config, result)
    if "eval/loss" in result:
        mean = f"mean over {count_images(None, data.evaluation)}: {result['eval/loss']:.4f}"
        say(f"loss of {data.hidden_patches.counted} patches, {mean}")
