"""Weights of one run as the beginning of a classifier's."""

from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mae_jax.interop.weights import Weights, find_checkpoint, has_checkpoint, read_config, read_weights
from mae_jax.models.classifier import ClassifierConfig, make_classifier_config
from mae_jax.models.mae_config import MAEConfig
from mae_jax.models.parameters import resize_positions
from mae_jax.models.positions import sincos_table

# Settings of `model` that a run chooses for itself; the others are the checkpoint's.
OWN_MODEL_SETTINGS = ("image_size", "dtype", "remat", "scan_unroll")


def resolve_model(config: ml_collections.ConfigDict, workdir: Path) -> Weights | None:
    """Sets the encoder's sizes in `config` to those of the checkpoint that the run goes on from, or begins with.

    Returns:
      The weights to begin with, if the run begins and has `init_from`.

    Raises:
      UserError: if there is no readable checkpoint, or it holds no encoder.
    """
    if has_checkpoint(workdir):
        weights, trained = None, read_config(find_checkpoint(workdir))[0]
    elif config.init_from:
        weights = read_weights(config.init_from)
        trained = weights.config
    else:
        return None
    config.model.update({name: value for name, value in trained["model"].items() if name not in OWN_MODEL_SETTINGS})
    return weights


def starting_params(weights: Weights, model: ClassifierConfig) -> dict[str, Any]:
    """What a classifier takes over from a checkpoint, as one nested dict: the encoder, and a head of the same kind.

    A position table for another grid is resized in 2-D: of a pre-trained model the sine-cosine table that it was
    trained with, since the formula's values beyond its edge are new to the encoder.
    """
    params, old = weights.params, MAEConfig(**weights.config["model"])
    table = params["encoder"].get("positions")
    table = sincos_table(old.grid, old.width) if table is None else table
    encoder = params["encoder"] | {"positions": resize_positions(table, old.grid, model.encoder.grid)}
    if keeps_head(weights, model):
        return {"encoder": encoder, "head": params["head"]}
    if model.pool == "mean_norm":  # this norm follows the pool, so it belongs to the head, and is new
        norm = encoder["norm"]
        encoder["norm"] = {"scale": np.ones_like(norm["scale"]), "bias": np.zeros_like(norm["bias"])}
    return {"encoder": encoder}


def keeps_head(weights: Weights, model: ClassifierConfig) -> bool:
    """Whether the checkpoint has a head of the kind that `model` has."""
    trained = weights.config
    if trained["task"] != "classify":
        return False
    old = make_classifier_config(trained["model"], trained["classifier"])
    return all(getattr(old, name) == getattr(model, name) for name in ("num_classes", "pool", "batch_norm"))


def describe_start(weights: Weights, model: ClassifierConfig, config: ml_collections.ConfigDict) -> str:
    """What a classifier begins with, and what differs from the run that trained it, for people."""
    old = weights.config
    text = f"{config.init_from}, step {weights.step:,} ({old['task']})"
    if keeps_head(weights, model):
        text += ", with its head"
    elif old["task"] == "classify" and old["classifier"]["num_classes"] != model.num_classes:
        classes = old["classifier"]["num_classes"]
        text += f"; a new head: the checkpoint's has {classes} classes, the data have {model.num_classes}"
    elif old["task"] == "classify":
        text += "; a new head: the checkpoint's has another pool or norm"
    old_grid = MAEConfig(**old["model"]).grid
    if old_grid != model.encoder.grid:
        text += f"; positions resized from {old_grid[0]} x {old_grid[1]} patches"
    for name in ("mean", "std"):
        if tuple(old["data"][name]) != tuple(config.data[name]):
            text += f"; note: data.{name} was {tuple(old['data'][name])}, is {tuple(config.data[name])}"
    return text
