"""Hugging Face's preprocessor_config.json: how pictures become a model's images."""

import math
from typing import Any

import numpy as np

from mae_jax.models.config import MAEConfig

BICUBIC = 3  # Pillow's number for the filter


def read_preprocessor(preprocessor: dict[str, Any]) -> dict[str, Any]:
    """Settings of `data.*` that a preprocessor_config.json states.

    Raises:
      ValueError, TypeError: for what makes no sense.
    """
    data = {}
    if preprocessor.get("do_normalize", True):
        for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
            if preprocessor.get(theirs) is not None:
                data[ours] = tuple(np.atleast_1d(preprocessor[theirs]).tolist())
    else:
        data |= {"mean": (0.0,), "std": (1.0,)}
    scale = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1.0
    if not 0 < scale < math.inf:
        raise ValueError(f"rescale_factor={scale!r}")
    if not math.isclose(scale, 1 / 255, rel_tol=1e-3):  # pictures are on 0..1 here before mean and std
        ratio = 1 / 255 / scale
        data = {name: tuple(value * ratio for value in values) for name, values in data.items()}
    if preprocessor:
        data["eval_crop"] = _read_crop(preprocessor)
    return data


def _crops(preprocessor: dict[str, Any]) -> bool:
    """Whether a processor cuts the centre out."""
    return bool(preprocessor.get("crop_pct") or preprocessor.get("do_center_crop", "crop_size" in preprocessor))


def _read_crop(preprocessor: dict[str, Any]) -> float:
    """The share of the resized picture's shorter side that a processor keeps; 1: it cuts nothing off."""
    if preprocessor.get("crop_pct"):  # timm's name, which our exports have too
        return preprocessor["crop_pct"]
    resized, kept = (_shorter_side(preprocessor.get(name)) for name in ("size", "crop_size"))
    return min(1.0, kept / resized) if resized and kept and _crops(preprocessor) else 1.0


def _shorter_side(size: int | list | dict[str, int] | None) -> int | None:
    """Of a size as preprocessor_config.json has it; None if it says none."""
    if isinstance(size, dict):
        size = [size[name] for name in ("shortest_edge", "height", "width") if size.get(name)]
    return min(size, default=None) if isinstance(size, list) else size


def done_otherwise(preprocessor: dict[str, Any]) -> list[str]:
    """Notes on what a preprocessor_config.json asks for that is done otherwise here."""
    notes, size = [], preprocessor.get("size")
    keeps_aspect = isinstance(size, dict) and "shortest_edge" in size
    if size and not (keeps_aspect or _crops(preprocessor)):
        notes.append("its processor stretches pictures; here the aspect is kept and the centre cut out")
    if preprocessor.get("resample", BICUBIC) != BICUBIC:
        notes.append(
            f"its processor resizes with resample={preprocessor['resample']!r}; here by Pillow's bicubic filter"
        )
    return notes


def make_preprocessor(model: MAEConfig, mean: tuple[float, ...], std: tuple[float, ...], eval_crop: float) -> dict:
    """The preprocessor_config.json with which transformers gives our pixels.

    Its BitImageProcessor resizes the shorter side and crops the centre. It has no resize that covers a rectangle: for
    images that are not square it is told the size before the crop, which stretches pictures of another aspect.
    """
    height, width = model.image_size
    resized = {"height": round(height / eval_crop), "width": round(width / eval_crop)}
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": model.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resized["height"]} if height == width else resized,
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(_for_channels(mean, model.channels)),
        "image_std": list(_for_channels(std, model.channels)),
        "crop_pct": eval_crop,  # not read by transformers: the sizes above are rounded
    }


def left_unsaid(model: MAEConfig) -> list[str]:
    """Notes on how transformers prepares pictures otherwise than we do, since its file cannot say it."""
    height, width = model.image_size
    notes = []
    if height != width:
        notes.append(f"transformers' processor stretches pictures whose aspect is not that of {height} x {width}")
    if model.channels == 1:
        notes.append("transformers' processor does not turn colours into grey: give it grey pictures")
    elif model.channels != 3:
        notes.append(f"transformers' processor takes grey and RGB pictures, none of {model.channels} channels")
    return notes


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) * channels if len(values) == 1 else tuple(values)
