"""Trained models as files of other programs: facebookresearch/mae, Hugging Face and timm."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.interop import huggingface, timm
from mae_jax.interop.preprocessor import left_unsaid, make_preprocessor
from mae_jax.interop.tensors import write_safetensors, write_torch
from mae_jax.interop.torch_layout import renamings, write_state
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import BATCH_NORM_EPSILON, ClassifierConfig, make_classifier_config
from mae_jax.models.config import MAEConfig
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError
from mae_jax.workdir.writing import write_json

# Format -> the pools whose heads it can hold.
POOLS = {
    "huggingface": ("class", "mean_norm"),
    "facebook": ("class", "mean_norm"),
    "timm": ("class", "mean", "mean_norm"),
}
FORMATS = tuple(POOLS)
# Settings of models that no other program has, unless they are the usual ones.
OURS_ALONE = ("class_tokens", "registers", "qk_norm")
DECODERS_OURS_ALONE = ("decoder_attention", "encoder_mask_tokens", "pca_targets")


def fit(weights: Weights, format: str, *, encoder_only: bool = False) -> Weights:
    """What of a model a format can hold; the notes tell what had to change.

    Raises:
      UserError: if it cannot hold the model.
    """
    config, notes = weights.config, []
    if encoder_only or (format == "timm" and "decoder" in weights.params):
        if not encoder_only:
            notes.append("timm's models are encoders: the decoder is left out")
        config = {k: v for k, v in config.items() if k not in ("classifier", "class_names")} | {"task": "pretrain"}
        if "positions" in weights.params["encoder"]:
            config["model"] = config["model"] | {"positions": "learned"}
        weights = weights._replace(config=config, params={"encoder": weights.params["encoder"]})
    model = MAEConfig(**config["model"])
    if config["task"] == "classify":
        classifier = make_classifier_config(config["model"], config["classifier"])
        _check_pool(classifier, format)
        if classifier.batch_norm and format != "facebook":
            notes.append("the BatchNorm before the linear layer is worked into it")
            config = config | {"classifier": config["classifier"] | {"batch_norm": False}}
            weights = weights._replace(config=config, params=fold_batch_norm(weights.params))
        if classifier.pool == "mean_norm" and format == "huggingface":
            notes.append("written as BeitForImageClassification: transformers' ViT has no such pool")
    _check_plain(model, weights)
    value_range = weights.config["data"].get("value_range")
    if value_range and format != "facebook":  # in whose file our own settings stand
        notes.append(f"data.value_range={value_range} is left out, which {format} does not know: scale pictures by it")
    if format == "timm":
        notes += timm.check(model) + timm.left_unsaid(model)
    if format == "huggingface":
        _check_square(model, weights)
        notes += left_unsaid(model)
    return weights._replace(notes=tuple(notes))


def export(weights: Weights, folder: Path, format: str, *, encoder_only: bool = False) -> list[Path]:
    """Writes a model, or what of it `fit`s, into a folder; returns the files in the order in which they came to be.

    huggingface: config.json, preprocessor_config.json and model.safetensors, for ViTMAEForPreTraining; of an encoder
    for ViTModel, of a classifier for ViTForImageClassification (with pool mean_norm, BeitForImageClassification).
    facebook: model.pth. timm: config.json and model.safetensors, for `timm.create_model("local-dir:FOLDER")`.

    Args:
      encoder_only: leave decoder or head out.

    Raises:
      UserError: for a model that the format cannot hold; nothing is written then.
    """
    weights = fit(weights, format, encoder_only=encoder_only)
    model, classifier = MAEConfig(**weights.config["model"]), None
    if weights.config["task"] == "classify":
        classifier = make_classifier_config(weights.config["model"], weights.config["classifier"])
    state = write_state(_with_tables(weights.params, model), renamings(classifier), model.patch_size)
    data = {name: weights.config["data"].get(name) for name in ("mean", "std", "eval_crop", "value_range")}
    write = {"huggingface": _write_huggingface, "facebook": _write_facebook, "timm": _write_timm}[format]
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, state, weights, model, classifier, data)


def _check_pool(classifier: ClassifierConfig, format: str) -> None:
    if classifier.pool not in POOLS[format]:
        able = [f"format={name}" for name, pools in POOLS.items() if classifier.pool in pools]
        remedy = f"export {' or '.join(able)}" if able else "export the encoder: --config.encoder_only=True"
        raise UserError(
            f"format={format} has no head for classifier.pool={classifier.pool} (only for "
            f"{', '.join(POOLS[format])}): {remedy}, or fine-tune with --config.classifier.pool={POOLS[format][0]}"
        )


def _check_plain(model: MAEConfig, weights: Weights) -> None:
    """Refuses what is in no model of the other programs."""
    usual, decoder = MAEConfig(), "decoder" in weights.params
    for name in OURS_ALONE + decoder * DECODERS_OURS_ALONE:
        if getattr(model, name) != getattr(usual, name):
            remedy = "; export the encoder: --config.encoder_only=True" if name in DECODERS_OURS_ALONE else ""
            raise UserError(f"model.{name}={getattr(model, name)}: no other program has such models{remedy}")


def _check_square(model: MAEConfig, weights: Weights) -> None:
    """Refuses images that are not square where transformers' classes cannot take them."""
    height, width = model.image_size
    beit = weights.config["task"] == "classify" and weights.config["classifier"]["pool"] == "mean_norm"
    if height == width or not (beit or "decoder" in weights.params):
        return
    kind, remedy = ("BEiT", "format=timm or facebook") if beit else ("ViTMAE", "format=facebook")
    raise UserError(
        f"transformers' {kind} takes square images only, not {height} x {width}: export {remedy}, or the encoder alone "
        "(--config.encoder_only=True)"
    )


def fold_batch_norm(params: dict[str, Any]) -> dict[str, Any]:
    """A classifier's parameters with the BatchNorm before its linear layer worked into that layer."""
    head = dict(params["head"])
    norm, linear = head.pop("batch_norm"), head["linear"]
    scale = 1 / np.sqrt(np.asarray(norm["variance"], np.float64) + BATCH_NORM_EPSILON)
    kernel = np.asarray(linear["kernel"], np.float64) * scale[:, None]
    bias = linear["bias"] - np.asarray(norm["mean"], np.float64) @ kernel
    head["linear"] = {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
    return params | {"head": head}


def _with_tables(params: dict[str, Any], model: MAEConfig) -> dict[str, Any]:
    """The parameters with the tables of positions that files of others hold also if they are a formula."""
    widths = {"encoder": model.width, "decoder": model.decoder_width}
    tables = {part: {"positions": sincos_table(model.grid, width)} for part, width in widths.items() if part in params}
    return params | {part: table | params[part] for part, table in tables.items()}


def _write_huggingface(folder, state, weights, model, classifier, data) -> list[Path]:
    architecture = "ViTModel"
    if classifier:
        architecture = "ViTForImageClassification" if classifier.pool == "class" else huggingface.BEIT
    if "decoder" in weights.params:
        architecture = "ViTMAEForPreTraining"
    classes = classifier and classifier.num_classes
    config = huggingface.make_config(model, architecture, weights.config.get("class_names"), classes)
    config["step"] = weights.step
    processor = make_preprocessor(model, data["mean"], data["std"], data["eval_crop"])
    tensors = huggingface.from_state(state, architecture)
    return [
        write_json(folder / "config.json", config),
        write_json(folder / "preprocessor_config.json", processor),
        _write_tensors(folder / "model.safetensors", tensors),
    ]


def _write_timm(folder, state, weights, model, classifier, data) -> list[Path]:
    config = timm.make_config(model, classifier, data, weights.config.get("class_names"))
    return [write_json(folder / "config.json", config), _write_tensors(folder / "model.safetensors", state)]


def _write_facebook(folder, state, weights, model, classifier, data) -> list[Path]:
    # A .pth has no config.json beside it: what its tensors do not say stands in it, where other programs do not look.
    own = {"model": weights.config["model"], "data": data, "step": weights.step}
    if classifier:
        own["class_names"] = weights.config.get("class_names")
    path = folder / "model.pth"
    write_torch(path, {"model": state, "mae_jax": _plain(own)})
    return [path]


def _plain(value: Any) -> Any:
    """With lists for tuples, as JSON has them."""
    return json.loads(json.dumps(value))


def _write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    write_safetensors(path, tensors)
    return path
