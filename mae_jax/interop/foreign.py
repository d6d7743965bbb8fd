"""Models in files of other programs: facebookresearch/mae, Hugging Face and timm. Which one it is shows in the file.

Settings come from a config.json beside the tensors, from what the file says itself, else from the shapes. What is
assumed, missing or left over is noted; what would change the model's results is refused.
"""

import dataclasses
from pathlib import Path
from typing import Any

from mae_jax.interop.description import TABLES, Description
from mae_jax.interop.tensors import read_tensors
from mae_jax.interop.torch_layout import places, read_params, renamings
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import abstract_variables
from mae_jax.models.config import MAEConfig
from mae_jax.models.mae import abstract_params
from mae_jax.runtime.errors import UserError, first_line

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.pt")


def is_foreign(path: Path) -> bool:
    """Whether a path is a file, or a folder with weights of other programs."""
    if path.is_file():
        return True
    own = (path / "params").is_dir() or (path / "checkpoints").is_dir()
    return path.is_dir() and not own and any(next(path.glob(pattern), None) for pattern in WEIGHT_FILES)


def read_foreign(path: Path, asked: dict[str, Any] | None = None) -> Weights:
    """Reads a file, or a folder of files.

    Args:
      asked: settings of `model.*` that stand in for what the file does not say (`GUESSABLE`).

    Raises:
      UserError: for a file that is damaged, would run code, or holds no ViT or one that differs from ours; or for an
        asked setting that the file contradicts.
    """
    file = read_tensors(path)
    try:  # whatever stands in these files, of whatever type
        found = Description(path, file)
        model = found.model_config(asked or {})
        classifier = found.classifier_config(model) if found.has_head else None
        shapes = abstract_variables(classifier) if classifier else abstract_params(model, decoder=found.has_decoder)
        data = found.data_settings(model.channels)
        names = found.class_names
        if names and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise TypeError("its class names are not a list of strings")
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{path}, or a JSON file beside it, says something in a form that is not known ({first_line(error)})"
        ) from error
    config: dict[str, Any] = {"task": "pretrain", "seed": 0, "model": _as_settings(model), "data": data}
    renamed = renamings(classifier)
    if classifier:
        config["class_names"] = names if names and len(names) == classifier.num_classes else None
        config["task"] = "classify"
        config["classifier"] = {k: v for k, v in dataclasses.asdict(classifier).items() if k != "encoder"}
    elif not found.has_decoder:
        found.notes.append("no decoder in it: it can encode, not reconstruct")
    used = {place.name for place in places(shapes, renamed, model.patch_size)} | set(TABLES)
    found.notes += found.left_over(used)
    params = read_params(found.state, shapes, renamed, model.patch_size, str(path))
    return Weights(config, params, found.step, found.origin, tuple(found.notes))


def _as_settings(model: MAEConfig) -> dict[str, Any]:
    """The settings `model.*` that make this model, with the ratio of the MLPs where it is the usual one."""
    settings = dataclasses.asdict(model)
    for name, width in (("mlp_width", model.width), ("decoder_mlp_width", model.decoder_width)):
        settings[name] = None if settings[name] == int(model.mlp_ratio * width) else settings[name]
    return settings
