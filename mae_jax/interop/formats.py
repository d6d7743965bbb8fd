"""Writes trained models as files of other programs (facebookresearch/mae, Hugging Face, timm), or as programs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.interop import huggingface, onnx_vit, stablehlo, timm
from mae_jax.interop.channels import VALUES
from mae_jax.interop.programs import ABOUT, NAMES, check_size, describe, programs_of
from mae_jax.interop.tensors import write_safetensors, write_torch
from mae_jax.interop.torch_layout import write_state
from mae_jax.interop.transfer import in_other_units
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import BATCH_NORM_EPSILON, LABEL_FACTS, is_classifier, make_classifier_config
from mae_jax.models.config import MAEConfig
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError
from mae_jax.workdir.writing import write_atomically, write_json

WEIGHTS = ("huggingface", "facebook", "timm")  # these can be read again
PROGRAMS = {"stablehlo": stablehlo, "onnx": onnx_vit}
FORMATS = (*WEIGHTS, *PROGRAMS)
# The files of each that hold weights.
FILES = {"huggingface": ("model.safetensors",), "facebook": ("model.pth",), "timm": ("model.safetensors",)}
FILES |= {format: tuple(f"{name}.{format}" for name in NAMES) for format in PROGRAMS}
# Model settings for which no other program has values but the defaults.
OURS_ALONE = ("class_tokens", "registers", "qk_norm")
DECODERS_OURS_ALONE = ("decoder_attention", "encoder_mask_tokens", "pca_targets", "target")
DATA = ("mean", "std", "eval_crop", *VALUES)  # settings `data.*` that say how a model's images are made
ENCODER_ONLY = "export the encoder: --config.encoder_only=True"


def fit(weights: Weights, format: str, *, encoder_only: bool = False) -> Weights:
    """The part of a model that a format can hold, with notes on what had to change. UserError if it cannot hold it."""
    config, notes = weights.config, []
    if encoder_only or (format == "timm" and "decoder" in weights.params):
        if not encoder_only:
            notes.append("timm's models are encoders: the decoder is left out")
        heads = ("classifier", "class_names", *LABEL_FACTS)
        config = {k: v for k, v in config.items() if k not in heads} | {"task": "pretrain"}
        if "positions" in weights.params["encoder"]:
            config["model"] = config["model"] | {"positions": "learned"}
        weights = weights._replace(config=config, params={"encoder": weights.params["encoder"]})
    if format in PROGRAMS:
        return _fit_programs(weights, format)
    model, has_decoder = MAEConfig(**config["model"]), "decoder" in weights.params
    pool = config["classifier"]["pool"] if is_classifier(config) else None
    if pool not in (None, "class", "mean_norm") and (format, pool) != ("timm", "mean"):
        remedy = f"export format=timm, or {ENCODER_ONLY}" if pool == "mean" else ENCODER_ONLY
        raise UserError(f"format={format} has no head for classifier.pool={pool}: {remedy}")
    kind = config.get("label_kind", "class")
    if pool and kind == "number":
        notes.append("the mean and standard deviation of its numbers are folded into the linear layer")
        old = make_classifier_config(config["model"], config["classifier"], config)
        plain = dataclasses.replace(old, number_mean=(), number_std=())
        params = weights.params | {"head": in_other_units(weights.params["head"], old, plain)}
        config = {name: value for name, value in config.items() if name not in ("number_mean", "number_std")}
        weights = weights._replace(config=config, params=params)
    if pool and kind != "class" and format == "timm":
        meaning = "a logit of a sigmoid for each class" if kind == "multi" else "numbers"
        notes.append(f"timm's files do not say that the outputs are {meaning}")
    if pool and config["classifier"]["batch_norm"] and format != "facebook":
        notes.append("the BatchNorm before the linear layer is folded into it")
        config = config | {"classifier": config["classifier"] | {"batch_norm": False}}
        weights = weights._replace(config=config, params=fold_batch_norm(weights.params))
    beit = format == "huggingface" and pool == "mean_norm"
    if beit:
        notes.append("written as BeitForImageClassification: transformers' ViT has no such pool")
    for name in OURS_ALONE + has_decoder * DECODERS_OURS_ALONE:
        if (value := getattr(model, name)) != getattr(MAEConfig(), name):
            remedy = f"; {ENCODER_ONLY}" if name in DECODERS_OURS_ALONE else ""
            raise UserError(f"model.{name}={value}: no other program has such models{remedy}")
    if format != "facebook" and (steps := _unusual_steps(config["data"])):  # its file holds our own settings
        notes.append(f"{format} knows 8-bit pictures alone: give it {'; '.join(steps)}; then mean and std")
    if format == "timm":
        notes += timm.check(model)
    if format == "huggingface":
        height, width = model.image_size
        if height != width and (has_decoder or beit):
            size = f"square images only, not {height} x {width}"
            raise UserError(f"transformers' ViTMAE and BEiT take {size}: export format=facebook, or {ENCODER_ONLY}")
        notes += huggingface.left_unsaid(model)
    return weights._replace(notes=tuple(notes))


def _fit_programs(weights: Weights, format: str) -> Weights:
    for program in programs_of(weights):
        check_size(weights, format, program)
    PROGRAMS[format].check(weights)
    return weights


def _unusual_steps(data: dict[str, Any]) -> list[str]:
    """What is done to pictures before mean and std, in words; empty for 8-bit pictures, which are divided by 255."""
    bands, dtype, value_range = (data.get(name) for name in ("bands", "dtype", "value_range"))
    steps = [f"channels {', '.join(map(str, bands))} of each file, counted from 0 (data.bands)"] if bands else []
    if value_range:
        steps.append(f"values scaled to [0, 255] by data.value_range={value_range} and clipped; it divides them by 255")
    elif dtype not in ("uint8", None):
        steps.append(f"the {dtype} values as they are, not divided by 255")
    return steps


def fold_batch_norm(params: dict[str, Any]) -> dict[str, Any]:
    """A classifier's parameters with the BatchNorm before its linear layer folded into that layer."""
    norm, linear = params["head"]["batch_norm"], params["head"]["linear"]
    scale = 1 / np.sqrt(np.asarray(norm["variance"], np.float64) + BATCH_NORM_EPSILON)
    kernel = np.asarray(linear["kernel"], np.float64) * scale[:, None]
    bias = linear["bias"] - np.asarray(norm["mean"], np.float64) @ kernel
    return params | {"head": {"linear": {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}}}


def export(weights: Weights, folder: Path, format: str, *, encoder_only: bool = False) -> list[Path]:
    """Writes the part of a model that `fit`s into a folder; returns the files in the order of writing.

    `encoder_only` leaves out decoder and head. Raises UserError, before writing, if the format cannot hold the model.
    """
    weights = fit(weights, format, encoder_only=encoder_only)
    if format in PROGRAMS:
        return _write_programs(weights, folder, format)
    config, step = weights.config, weights.step
    model, names = MAEConfig(**config["model"]), config.get("class_names")
    classifier = None
    if is_classifier(config):
        classifier = make_classifier_config(config["model"], config["classifier"], config)
    data = {name: config["data"].get(name) for name in DATA}
    params = dict(weights.params)
    for part, width in (("encoder", model.width), ("decoder", model.decoder_width)):
        if part in params:  # files hold position tables as tensors, even if a formula gives them
            params[part] = {"positions": sincos_table(model.grid, width)} | params[part]
    state = write_state(params, classifier, model.patch_size)
    folder.mkdir(parents=True, exist_ok=True)
    if format == "facebook":
        # Without a config.json, what the tensors do not say is stored beside them; other programs ignore it.
        own = {"model": config["model"], "data": data, "step": step}
        own |= {"class_names": names, "label_kind": classifier.label_kind} if classifier else {}
        write_torch(folder / "model.pth", state, {"mae_jax": json.loads(json.dumps(own))})  # without tuples
        return [folder / "model.pth"]
    if format == "timm":
        files = {"config.json": timm.make_config(model, classifier, data, names)}
    else:
        architecture = huggingface.architecture_of(weights)
        state = huggingface.from_state(state, architecture)
        files = {
            "config.json": huggingface.make_config(model, architecture, names, classifier) | {"step": step},
            "preprocessor_config.json": huggingface.make_preprocessor(model, data),
        }
    if _unusual_steps(data):  # others ignore this
        files["config.json"] = files["config.json"] | {"mae_jax": {"data": data}}
    for name, content in files.items():
        write_json(folder / name, content)
    write_safetensors(folder / "model.safetensors", state)
    return [folder / name for name in (*files, "model.safetensors")]


def _write_programs(weights: Weights, folder: Path, format: str) -> list[Path]:
    programs = programs_of(weights)
    about, files = describe(weights, format, programs), []
    folder.mkdir(parents=True, exist_ok=True)
    for program in programs:
        files.append(folder / about["programs"][program.name]["file"])
        write_atomically(files[-1], PROGRAMS[format].serialize(weights, program, about))
    write_json(folder / ABOUT, about)
    return [*files, folder / ABOUT]
