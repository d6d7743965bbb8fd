"""Reconstructions: draw what a checkpoint predicts for given pictures, and measure its loss on them."""

from pathlib import Path

import ml_collections

from mae_jax.config import from_dict
from mae_jax.data.pictures import PictureFiles
from mae_jax.data.sources import make_source
from mae_jax.errors import UserError
from mae_jax.evaluation.pretraining import MAEEvaluation
from mae_jax.interop.weights import read_weights
from mae_jax.mesh import make_mesh
from mae_jax.models.mae import MAEConfig, check_mask_ratio
from mae_jax.training.reporting import provenance, save_picture, write_json
from mae_jax.training.signals import StopSignal


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Draws reconstructions/<step>.png and writes result.json with the loss over all the pictures.

    Model and data preparation are the checkpoint's; `data.path`, if set, names the pictures, otherwise they are the
    evaluation images of the checkpoint's own data.

    Raises:
      UserError: without a checkpoint, or without pictures.
    """
    if not config.init_from:
        raise UserError("init_from is not set: which model? For example --config.init_from=runs/digits")
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} belongs to a training run; choose another folder for the pictures")
    weights = read_weights(config.init_from)
    pictures = PictureFiles(config.data.path) if config.data.path else None
    trained = from_dict(weights.config)
    config = ml_collections.ConfigDict(config.to_dict() | {"model": trained["model"], "data": trained["data"]})
    model = MAEConfig(**config.model)
    if config.evaluate.mask_ratio is not None:
        check_mask_ratio(config.evaluate.mask_ratio, model.num_patches, "evaluate.mask_ratio")
    source = pictures or make_source(config.data, "eval", model.image_size, model.channels)
    evaluation = MAEEvaluation(config, model, make_mesh(config.mesh), None, source)

    write_json(workdir / "config.json", config.to_dict() | provenance())
    caption = f"{config.init_from}, step {weights.step:,}"
    picture = save_picture(
        workdir / "reconstructions" / f"{weights.step}.png", evaluation.picture(weights.params, caption)
    )
    result = {"step": weights.step, "eval/loss": evaluation.loss(weights.params), "images": len(evaluation.eval_source)}
    write_json(workdir / "result.json", result)
    print(f"loss of the hidden patches, mean over {result['images']:,} images: {result['eval/loss']:.4f}")
    print(f"see {picture}")
