"""Starts a run from the weights and settings of another."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.interop.channels import VALUES, adapt_channels
from mae_jax.interop.weights import choose, find_same_weights, read_weights
from mae_jax.interop.workdirs import Weights, read_own_config
from mae_jax.models.classifier import ClassifierConfig, is_classifier, make_classifier_config
from mae_jax.models.config import USUAL_MASKS, MAEConfig
from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import from_dict

# Size and values of the pictures that an encoder knows: the checkpoint's, unless the command line gives others.
PICTURES = ("model.image_size", *(f"data.{name}" for name in VALUES))
# Settings of `model` that a run chooses for itself; the rest come from the checkpoint.
OWN_MODEL_SETTINGS = ("image_size", "dtype", "attention", "remat", "scan_unroll")
# Settings that define the parameters of an encoder and a decoder.
ENCODER_STRUCTURE = (
    "patch_size", "channels", "width", "depth", "num_heads", "activation", "qkv_bias", "class_tokens", "registers",
    "qk_norm",
)  # fmt: skip
DECODER_STRUCTURE = (
    "decoder_width", "decoder_depth", "decoder_num_heads", "decoder_attention", "encoder_mask_tokens", "pca_targets",
    "target",
)  # fmt: skip
CHANNELS = "for other channels set init_channels, such as --config.init_channels=mean"
ENCODER_SETTINGS = (*ENCODER_STRUCTURE, "mlp_ratio", "mlp_width", "norm_epsilon")


def find_start(config: ConfigDict, workdir: Path) -> tuple[dict[str, Any] | None, Weights | None]:
    """A resumed run's own config, and None; for a new one config and weights of `init_from`, if set, else both None."""
    if trained := read_own_config(workdir):
        return trained, None
    weights = read_start(config, workdir)
    return weights and weights.config, weights


def read_start(config: ConfigDict, workdir: Path) -> Weights | None:
    """The weights of `init_from`, if set, for `init_channels`; the same ones when a run here is started again."""
    if not config.init_from:
        return None
    weights = read_weights(find_same_weights(config.init_from, workdir), config.assume)
    if config.init_channels is None:
        return weights
    return adapt_channels(weights, config.model.channels, config.init_channels, config.init_from)


def resolve_model(config: ConfigDict, trained: dict[str, Any]) -> list[str]:
    """Sets the encoder's sizes (UserError if others are given) and `PICTURES` to a checkpoint's; a line per change."""
    # Settings that an older checkpoint lacks get their defaults. A classifier masks nothing, so masks need not fit.
    model = dataclasses.asdict(MAEConfig(**trained["model"])) | USUAL_MASKS
    sizes = {name: value for name, value in model.items() if name not in OWN_MODEL_SETTINGS}
    changed = []
    for name in ENCODER_SETTINGS:
        asked, own = config.model[name], sizes[name]
        if asked != own and f"model.{name}" in config.given:
            remedy = CHANNELS if name == "channels" else "leave it out"
            raise UserError(f"model.{name}={asked!r} is {own!r} in the checkpoint and cannot be changed: {remedy}")
        if asked != own:
            changed.append(f"model.{name} is {own!r}, the checkpoint's, not {asked!r}")
    config.model.update(sizes)
    return changed + resolve_pictures(config, trained)


def resolve_pictures(config: ConfigDict, trained: dict[str, Any]) -> list[str]:
    """Sets `PICTURES` in `config` to a checkpoint's, unless other `data.statistics` are given; a line per change."""
    changed, measured = [], config.data.statistics not in (None, trained["data"].get("statistics"))
    for key in PICTURES:
        group, name = key.split(".")
        if key in config.given or (measured and group == "data"):
            continue
        if name not in trained[group]:  # other programs and earlier versions leave some out
            continue
        if name == "dtype" and "data.value_range" in config.given:  # pictures of another depth
            continue
        asked, own = config[group][name], trained[group][name]
        pairs = [(size, size) if isinstance(size, int) else size for size in (asked, own)]  # (height, width)
        if pairs[0] != pairs[1]:
            config[group][name] = own
            if (name, asked) != ("dtype", None):  # nothing was asked
                changed.append(f"{key} is {own!r}, the checkpoint's, not {asked!r}")
    return changed


def starting_params(weights: Weights, model: ClassifierConfig, class_names: list[str] | None = None) -> dict[str, Any]:
    """What a classifier takes over from a checkpoint, as one nested dict: the encoder, and a head of the same kind.

    A position table of another grid is resized in 2-D, even a formula's: values beyond its edge are new to the encoder.
    """
    encoder = choose(weights, {"positions": "learned", "image_size": model.encoder.image_size}).params["encoder"]
    if keeps_head(weights, model, class_names):
        old = make_classifier_config(weights.config["model"], weights.config["classifier"], weights.config)
        return {"encoder": encoder, "head": in_other_units(weights.params["head"], old, model)}
    pooled_before_norm = is_classifier(weights.config) and weights.config["classifier"]["pool"] == "mean_norm"
    if model.pool == "mean_norm" and not pooled_before_norm:  # this norm belongs to the head, and is new
        norm = encoder["norm"]
        encoder["norm"] = {"scale": np.ones_like(norm["scale"]), "bias": np.zeros_like(norm["bias"])}
    return {"encoder": encoder}


def keeps_head(weights: Weights, model: ClassifierConfig, class_names: list[str] | None = None) -> bool:
    """Whether the checkpoint's head is of `model`'s kind and for the same class names, if both are known."""
    trained = weights.config
    if not is_classifier(trained):
        return False
    known = trained.get("class_names")
    if class_names and known and tuple(known) != tuple(class_names):
        return False
    old = make_classifier_config(trained["model"], trained["classifier"], trained)
    alike = ("num_classes", "pool", "batch_norm", "label_kind")
    return all(getattr(old, name) == getattr(model, name) for name in alike)


def in_other_units(head: dict[str, Any], old: ClassifierConfig, new: ClassifierConfig) -> dict[str, Any]:
    """A classifier's head that gives the same numbers with the mean and standard deviation of another config."""
    if (old.number_mean, old.number_std) == (new.number_mean, new.number_std):
        return head
    (mean, std), (new_mean, new_std) = (
        (np.asarray(model.number_mean or 0.0), np.asarray(model.number_std or 1.0)) for model in (old, new)
    )
    kernel, bias = (np.asarray(head["linear"][name], np.float64) for name in ("kernel", "bias"))
    linear = {"kernel": kernel * (std / new_std), "bias": (bias * std + mean - new_mean) / new_std}
    return head | {"linear": {name: values.astype(np.float32) for name, values in linear.items()}}


def describe_start(
    weights: Weights, model: ClassifierConfig, config: ConfigDict, class_names: list[str] | None = None
) -> str:
    """What a classifier begins with, and what differs from the run that trained it, in words."""
    old = weights.config
    parts = [f"{config.init_from}, {weights.origin}"]
    if keeps_head(weights, model, class_names):
        parts[0] += ", with its head"
    elif is_classifier(old):
        classes, text = old["classifier"]["num_classes"], "other classes, or another pool or norm"
        kind = old.get("label_kind", "class")
        if kind != model.label_kind:
            text = f"labels of the kind {kind}, the data of the kind {model.label_kind}"
        elif classes != model.num_classes:
            text = f"{classes} classes, the data have {model.num_classes}"
        parts.append(f"a new head: the checkpoint's has {text}")
    rows, columns = MAEConfig(**old["model"]).grid
    if (rows, columns) != model.encoder.grid:
        parts.append(f"positions resized from {rows} x {columns} patches")
    notes = [note for note in weights.notes if "reconstruct" not in note] + pictures_differ(weights, config.data)
    return "; ".join(parts + [f"note: {note}" for note in notes])


def pictures_differ(weights: Weights, data: Mapping) -> list[str]:
    """Notes on value ranges and normalisations that differ from those that the weights were trained with."""
    old, new = from_dict(dict(weights.config["data"])), from_dict(dict(data))
    names = [name for name in VALUES if old.get(name) != new.get(name)] if "mean" in old else []  # see adapt_channels
    names = [name for name in names if name != "dtype" or name in old]  # earlier versions and other programs
    return [f"data.{name} was {old.get(name)}, is {new.get(name)}" for name in names]


def fitting_params(weights: Weights, config: Mapping) -> tuple[dict, list[str]]:
    """The parameters of an autoencoder or encoder that a pre-training run starts from, and notes on what differs."""
    path = config["init_from"]
    if is_classifier(weights.config):
        raise UserError(f"init_from={path} is a classifier without a decoder; pre-training needs an autoencoder")
    old, new = MAEConfig(**weights.config["model"]), MAEConfig(**config["model"])
    whole = "decoder" in weights.params
    if new.positions == "learned" and old.positions == "sincos":  # the tables start with the formula's values
        weights = choose(weights, {"positions": "learned"})
        old = dataclasses.replace(old, positions="learned")
    names = (*ENCODER_STRUCTURE, "positions", *(DECODER_STRUCTURE if whole else ()))
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in names}
    for name, blocks in (("mlp_width", "blocks"), ("decoder_mlp_width", "decoder_blocks"))[: 1 + whole]:
        pairs[name] = getattr(old, blocks).mlp_width, getattr(new, blocks).mlp_width
    if differing := ", ".join(f"model.{name}={a!r} (here {b!r})" for name, (a, b) in pairs.items() if a != b):
        remedy = f"; {CHANNELS}" if old.channels != new.channels else ""
        raise UserError(f"init_from={path} holds another model: {differing}; make these settings the same{remedy}")
    weights = choose(weights, USUAL_MASKS | {"image_size": new.image_size})  # masks are this run's own
    notes = list(weights.notes)
    if not whole:
        notes.append("the decoder starts from random weights")
    for name in ("norm_epsilon", "normalize_targets")[: 1 + whole]:
        if (before := getattr(old, name)) != (now := getattr(new, name)):
            notes.append(f"model.{name} was {before}, is {now}")
    return weights.params, notes + pictures_differ(weights, config["data"])
