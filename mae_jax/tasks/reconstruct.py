"""Reconstructions: draw what a checkpoint predicts for given pictures, and measure its loss on them."""

from pathlib import Path

import ml_collections

from mae_jax.data.datasets import make_source
from mae_jax.data.image_folder import PictureFiles
from mae_jax.data.sources import Source, count_images, describe_sources
from mae_jax.evaluation.pretraining import MAEEvaluation
from mae_jax.interop.weights import has_decoder
from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import check_heads, make_mesh, parameter_shardings, put
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import open_checkpoint, write_measurement
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import save_picture, write_json


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Draws the pictures of `data.path`, if it is set, otherwise evaluation images of the checkpoint's own data.

    Raises:
      UserError: without a checkpoint of an autoencoder, or without pictures.
    """
    pictures = config.data.path
    config.data.path = None
    weights, config = open_checkpoint(config, workdir, needs_data=not pictures)
    if weights.config["task"] == "classify":
        raise UserError(f"init_from={config.init_from} is a classifier, which has no decoder: nothing to reconstruct")
    model = MAEConfig(**config.model)
    if pictures:
        source = PictureFiles(pictures)
        config.data.name, config.data.path = None, pictures  # what a result tells was measured
    else:
        source = make_source(config.data, "eval", model.image_size, model.channels)
    say(*describe_sources(pictures or config.data.name, None, source))
    reconstruct(weights, config, workdir, source)


def reconstruct(weights: Weights, config: ml_collections.ConfigDict, workdir: Path, source: Source) -> None:
    """Draws reconstructions/<step>.png and writes result.json with the loss over all images of a source.

    Raises:
      UserError: for a model without a decoder, or a mask ratio or masks by hand that do not fit.
    """
    if not has_decoder(weights):
        raise UserError(
            f"init_from={config.init_from} holds only an encoder: nothing can be reconstructed; give a file with its "
            "decoder (of the released ones mae_pretrain_vit_*_full or mae_visualize_vit_*)"
        )
    model = MAEConfig(**config.model)
    if config.evaluate.mask_ratio is not None:
        model.num_visible(config.evaluate.mask_ratio, name="evaluate.mask_ratio")
    mesh = make_mesh(config.mesh)
    check_heads(mesh, model)
    evaluation = MAEEvaluation(config, model, mesh, None, source)
    params = put(weights.params, parameter_shardings(mesh, weights.params))
    write_json(workdir / "config.json", config.to_dict() | provenance())
    caption = f"{config.init_from}, {weights.origin}"
    picture = workdir / "reconstructions" / f"{weights.step}.png"
    save_picture(picture, evaluation.picture(params, caption))
    result = {"step": weights.step, "eval/loss": evaluation.loss(params), "images": len(evaluation.eval_source)}
    write_measurement(workdir, config, result)
    images = count_images(None, evaluation.eval_source)
    say(f"loss of {evaluation.counted} patches, mean over {images}: {result['eval/loss']:.4f}")
    say(f"see {picture}")
