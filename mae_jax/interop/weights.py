"""Loads trained models, wherever they come from: our workdirs, facebookresearch/mae, Hugging Face and timm."""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mae_jax.data.processor import Processor
from mae_jax.interop.foreign import GUESSABLE, is_foreign, read_foreign
from mae_jax.interop.workdirs import Weights, find_checkpoint, read_workdir
from mae_jax.models.classifier import Classifier, is_classifier, make_bind_classifier, make_classifier_config
from mae_jax.models.config import USUAL_MASKS
from mae_jax.models.mae import MAEConfig, MaskedAutoencoder, make_bind
from mae_jax.models.positions import resize_positions, sincos_table
from mae_jax.runtime.errors import UserError, escaped, first_line
from mae_jax.runtime.mesh import fit_to_chip
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.settings.registry import nearest
from mae_jax.workdir.writing import read_object, write_json

HUB_SETTINGS = ("config.json", "preprocessor_config.json")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
PYTORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "*.pth")  # fetched if there are no safetensors
# Settings of `model.*` that the user may choose for any file.
CHOOSABLE = ("dtype", "attention", "remat", "scan_unroll", "mask_ratio", "image_size", "positions")


def find_weights(path: str | Path) -> Path:
    """The file, folder or newest checkpoint that a path means; fetches `hf://...` once. UserError if there is none."""
    if str(path).startswith("hf:/"):  # as a Path it loses one of its slashes
        return fetch(str(path))
    path = Path(path).expanduser().absolute()
    return path if is_foreign(path) else find_checkpoint(path)


def fetch(address: str) -> Path:
    """Downloads a model's files, unless huggingface_hub has them in its cache; returns their folder."""
    if not (found := re.fullmatch(r"hf:/+([\w.-]+/[\w.-]+)(?:@(\S+))?", address)):
        raise UserError(f"{address} is not of the form hf://owner/name or hf://owner/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f"reading {address} needs another package: pip install huggingface_hub") from error
    for weights in (SAFETENSORS, PYTORCH):
        patterns = [*HUB_SETTINGS, *weights]
        try:
            folder = snapshot_download(found[1], revision=found[2], allow_patterns=patterns, etag_timeout=20)
        except Exception as error:  # the package and its network libraries raise many types
            raise UserError(
                f"{address} cannot be downloaded ({type(error).__name__}: {first_line(error)}); check the name and the "
                "network, or fetch its files elsewhere and give their folder"
            ) from error
        if any(file.suffix in (".safetensors", ".bin", ".pth") for file in Path(folder).iterdir()):
            return Path(folder)
    raise UserError(f"{address} has no weights ({', '.join((*SAFETENSORS, *PYTORCH))})")


def read_weights(path: str | Path, asked: Mapping | None = None) -> Weights:
    """Reads what `find_weights` finds; `asked` gives settings `model.*` that another program's file does not state."""
    path = find_weights(path)
    asked = {name: value for name, value in (asked or {}).items() if value is not None}
    if is_foreign(path):
        return read_foreign(path, asked)
    if others := [name for name in asked if name != "image_size"]:
        raise UserError(f"{others[0]} cannot be set: {path} is a checkpoint of mae_jax, which says what it is")
    return read_workdir(path)


def find_same_weights(init_from: str, workdir: Path | None = None) -> Path:
    """`find_weights`, the same in all processes, even if another run writes its next checkpoint just now.

    A run notes the answer in init_from.json, and gets it again if restarted before its own first checkpoint.
    """
    found = Path(from_main(_pinned(init_from, workdir) if is_main() else None))
    return found if found.exists() else find_weights(init_from)  # each host has its own downloads


def _pinned(init_from: str, workdir: Path | None) -> str:
    if workdir and (workdir / "config.json").exists():  # without it, that run was refused before it began
        noted = read_object(workdir / "init_from.json") or {}
        checkpoint = noted.get("checkpoint")
        if noted.get("init_from") == init_from and isinstance(checkpoint, str) and Path(checkpoint).exists():
            return checkpoint
    found = str(find_weights(init_from))
    if workdir:
        write_json(workdir / "init_from.json", {"init_from": init_from, "checkpoint": found})
    return found


def check_workdir(workdir: Path) -> None:
    """Raises UserError if a folder holds weights, whose config.json a run would overwrite."""
    if is_foreign(workdir):
        raise UserError(f"--workdir={workdir} holds weights, with a config.json of their own; choose another folder")


def make_bind_of(weights: Weights) -> Callable[[dict], MaskedAutoencoder | Classifier]:
    """The pure function from variables to a model of the weights' kind."""
    config = weights.config
    if is_classifier(config):
        return make_bind_classifier(make_classifier_config(config["model"], config["classifier"], config))
    return make_bind(MAEConfig(**config["model"]), decoder="decoder" in weights.params)


def load(path: str | Path, **settings) -> MaskedAutoencoder | Classifier:
    """Loads a trained model.

    Warns (UserWarning) of all that a file leaves open, lacks or has too much. UserError if there is no readable model.

    Args:
      path: a workdir (its newest checkpoint) or one checkpoint; a facebookresearch/mae `.pth`; a Hugging Face or timm
        folder or file (safetensors or PyTorch); `hf://owner/name[@revision]`. The content tells which it is.
      settings: `model.*` of your choice: dtype="bfloat16", attention, remat, scan_unroll, mask_ratio; image_size
        (positions are computed, learned ones resized); positions="learned" (fixed tables become parameters, and are
        resized too, which suits images much larger than in training). Also what another program's file may leave open:
        num_heads, decoder_num_heads, normalize_targets, norm_epsilon, activation.

    Returns:
      An autoencoder: `model(images, key=key)` reconstructs; or a classifier: `model(images)` gives [B, K] outputs, by
      `model.label_kind` logits of a softmax (class), logits of one sigmoid each (multi), or numbers in the units of the
      training labels (number); `model.class_names` names the outputs, None if unknown. For both, `model.encode(images)`
      gives features, `model.processor(pictures)` images.
    """
    known = tuple(dict.fromkeys((*CHOOSABLE, *GUESSABLE)))
    for name in [name for name in settings if name not in known]:
        raise UserError(f"mae_jax.load has no setting {name!r}{nearest(name, known)} (there are: {', '.join(known)})")
    weights = read_weights(path, {name: value for name, value in settings.items() if name in GUESSABLE})
    chosen = {name: value for name, value in settings.items() if name in CHOOSABLE}
    fit_to_chip(chosen, jax.devices()[0], weights.config["model"])
    weights = choose(weights, chosen)
    for note in weights.notes:
        warnings.warn(escaped(f"{path}: {note}"), stacklevel=2)
    model = make_bind_of(weights)(jax.device_put(weights.params))
    model.processor = make_processor(weights.config)
    if names := weights.config.get("class_names"):
        model.class_names = tuple(names)
    return model


def make_processor(config: Mapping) -> Processor:
    """Prepares pictures as the settings `model` and `data` of a run's resolved config say."""
    model, data = MAEConfig(**config["model"]), config["data"]
    pictures = (data.get(name) for name in ("mean", "std", "eval_crop", "value_range", "dtype", "bands"))
    return Processor(model.image_size, model.channels, *pictures)


def choose(weights: Weights, settings: dict[str, Any]) -> Weights:
    """The same weights with other settings (`CHOOSABLE`) and adapted position tables."""
    model, params, notes = weights.config["model"], dict(weights.params), weights.notes
    if settings.keys() & {"image_size", "mask_ratio"}:
        settings = {"prediction_ratio": None} | settings  # used only in training, which is over
        try:
            MAEConfig(**model | settings)
        except UserError as error:  # the model's own masks do not fit; another cause is met again below
            settings = USUAL_MASKS | settings
            notes = (*notes, f"{error}; masks hide single random patches instead")
    old, new = MAEConfig(**model), MAEConfig(**model | settings)
    for part, width in (("encoder", old.width), ("decoder", old.decoder_width)):
        if part not in params:
            continue
        table = params[part].get("positions")
        if table is None and new.positions == "learned":
            table = sincos_table(old.grid, width)
        elif table is not None and settings.get("positions") == "sincos":
            raise UserError("positions='sincos': the model has learned positions, which would be lost")
        if table is not None:
            params[part] = params[part] | {"positions": np.asarray(resize_positions(table, old.grid, new.grid))}
    return weights._replace(config=weights.config | {"model": model | settings}, params=params, notes=notes)
