"""Weights and settings of one run as the beginning of another."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from mae_jax.interop.weights import assumed, pictures_differ, pin_weights, read_weights
from mae_jax.interop.workdirs import Weights, read_own_config
from mae_jax.models.classifier import ClassifierConfig, make_classifier_config
from mae_jax.models.config import USUAL_MASKS, MAEConfig
from mae_jax.models.positions import resize_positions, sincos_table
from mae_jax.runtime.errors import UserError

# Settings of `model` that a run chooses for itself; the others are the checkpoint's.
OWN_MODEL_SETTINGS = ("image_size", "dtype", "attention", "remat", "scan_unroll")
# What an encoder is used to: its pictures' size and values are the checkpoint's, unless the command line gives others.
PICTURES = ("model.image_size", "data.mean", "data.std", "data.value_range")
ENCODER_SETTINGS = (
    "patch_size", "channels", "width", "depth", "num_heads", "mlp_ratio", "mlp_width",
    "norm_epsilon", "activation", "qkv_bias", "class_tokens", "registers", "qk_norm",
)  # fmt: skip


def find_start(config: ml_collections.ConfigDict, workdir: Path) -> tuple[dict[str, Any] | None, Weights | None]:
    """What a run goes on from or begins with: the checkpoint's config, and the weights if it begins with `init_from`.

    Both are None if it begins from scratch, the weights too if it goes on from a checkpoint in its own workdir.

    Raises:
      UserError: if what `init_from` names cannot be read, or holds no encoder.
    """
    with contextlib.suppress(UserError):  # checkpoints that cannot be read are told, and set aside, when it goes on
        if trained := read_own_config(workdir):
            return trained, None
    weights = read_start(config, workdir)
    return weights and weights.config, weights


def read_start(config: ml_collections.ConfigDict, workdir: Path) -> Weights | None:
    """The weights that `init_from` names, the same ones when the run in the workdir is started again; None without."""
    return read_weights(pin_weights(config.init_from, workdir), assumed(config)) if config.init_from else None


def resolve_model(config: ml_collections.ConfigDict, trained: dict[str, Any]) -> list[str]:
    """Sets the encoder's sizes in `config` to those of a checkpoint's config, and what it knows of pictures.

    Returns:
      A line for each setting that was changed.

    Raises:
      UserError: if the command line gives the encoder another size.
    """
    # Newer settings, which a checkpoint of an earlier version lacks, are as they were; and since a classifier hides
    # nothing, masks that do not fit its size are no obstacle.
    model = dataclasses.asdict(MAEConfig(**trained["model"])) | USUAL_MASKS
    sizes = {name: value for name, value in model.items() if name not in OWN_MODEL_SETTINGS}
    changed = []
    for name in ENCODER_SETTINGS:
        asked, own = config.model[name], sizes[name]
        if asked != own and f"model.{name}" in config.given:
            raise UserError(f"model.{name}={asked!r} is {own!r} in the checkpoint and cannot be changed: leave it out")
        if asked != own:
            changed.append(f"model.{name} is {own!r}, the checkpoint's, not {asked!r}")
    config.model.update(sizes)
    return changed + resolve_pictures(config, trained)


def resolve_pictures(config: ml_collections.ConfigDict, trained: dict[str, Any]) -> list[str]:
    """Sets `PICTURES` in `config` to those of a checkpoint's config; returns a line for each that was changed."""
    changed = []
    for key in PICTURES:
        group, name = key.split(".")
        if key in config.given or name not in trained[group]:  # files of others do not say all, nor do earlier versions
            continue
        asked, own = config[group][name], trained[group][name]
        if _as_pair(asked) != _as_pair(own):
            changed.append(f"{key} is {own!r}, the checkpoint's, not {asked!r}")
            config[group][name] = own
    return changed


def _as_pair(value: Any) -> Any:
    """A size as (height, width); other values as they are."""
    return (value, value) if isinstance(value, int) else value


def starting_params(weights: Weights, model: ClassifierConfig, class_names: list[str] | None = None) -> dict[str, Any]:
    """What a classifier takes over from a checkpoint, as one nested dict: the encoder, and a head of the same kind.

    A position table for another grid is resized in 2-D: of a pre-trained model the sine-cosine table that it was
    trained with, since the formula's values beyond its edge are new to the encoder.
    """
    params, old = weights.params, MAEConfig(**weights.config["model"])
    table = params["encoder"].get("positions")
    table = sincos_table(old.grid, old.width) if table is None else table
    encoder = params["encoder"] | {"positions": np.asarray(resize_positions(table, old.grid, model.encoder.grid))}
    if keeps_head(weights, model, class_names):
        return {"encoder": encoder, "head": params["head"]}
    if model.pool == "mean_norm" and not _pooled_before_norm(weights):  # this norm belongs to the head, and is new
        norm = encoder["norm"]
        encoder["norm"] = {"scale": np.ones_like(norm["scale"]), "bias": np.zeros_like(norm["bias"])}
    return {"encoder": encoder}


def _pooled_before_norm(weights: Weights) -> bool:
    return weights.config["task"] == "classify" and weights.config["classifier"]["pool"] == "mean_norm"


def keeps_head(weights: Weights, model: ClassifierConfig, class_names: list[str] | None = None) -> bool:
    """Whether the checkpoint has a head of the kind that `model` has, for classes of the same names (if known)."""
    trained = weights.config
    if trained["task"] != "classify":
        return False
    old = make_classifier_config(trained["model"], trained["classifier"])
    known = trained.get("class_names")
    if class_names and known and tuple(known) != tuple(class_names):
        return False
    return all(getattr(old, name) == getattr(model, name) for name in ("num_classes", "pool", "batch_norm"))


def describe_start(
    weights: Weights,
    model: ClassifierConfig,
    config: ml_collections.ConfigDict,
    class_names: list[str] | None = None,
) -> str:
    """What a classifier begins with, and what differs from the run that trained it, for people."""
    old = weights.config
    text = f"{config.init_from}, {weights.origin}"
    if keeps_head(weights, model, class_names):
        text += ", with its head"
    elif old["task"] == "classify" and old["classifier"]["num_classes"] != model.num_classes:
        classes = old["classifier"]["num_classes"]
        text += f"; a new head: the checkpoint's has {classes} classes, the data have {model.num_classes}"
    elif old["task"] == "classify":
        text += "; a new head: the checkpoint's has other classes, or another pool or norm"
    old_grid = MAEConfig(**old["model"]).grid
    if old_grid != model.encoder.grid:
        text += f"; positions resized from {old_grid[0]} x {old_grid[1]} patches"
    text += "".join(f"; note: {note}" for note in weights.notes if "reconstruct" not in note)
    return text + "".join(f"; note: {note}" for note in pictures_differ(weights, config.data))
