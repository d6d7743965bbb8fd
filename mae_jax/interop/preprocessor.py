"""Hugging Face's preprocessor_config.json: how pictures become a model's images."""

import math
from typing import Any

import numpy as np

from mae_jax.models.config import MAEConfig

BICUBIC = 3  # Pillow's number for the filter


def read_preprocessor(preprocessor: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings `data.*` in a preprocessor_config.json, and notes on what is done differently here."""
    names = {"mean": "image_mean", "std": "image_std"}
    stated = {ours: preprocessor[theirs] for ours, theirs in names.items() if preprocessor.get(theirs) is not None}
    data = {name: tuple(np.atleast_1d(values).tolist()) for name, values in stated.items()}
    if not preprocessor.get("do_normalize", True):
        data = {"mean": (0.0,), "std": (1.0,)}
    scale = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1.0
    if not 0 < scale < math.inf:
        raise ValueError(f"rescale_factor={scale!r}")
    if not math.isclose(scale, 1 / 255, rel_tol=1e-3):  # here, pictures are on 0..1 before mean and std
        ratio = 1 / 255 / scale
        data = {name: tuple(value * ratio for value in values) for name, values in data.items()}

    size, kept = preprocessor.get("size"), _shorter_side(preprocessor.get("crop_size"))
    crops = preprocessor.get("crop_pct") or preprocessor.get("do_center_crop", "crop_size" in preprocessor)
    resized = _shorter_side(size)
    if preprocessor.get("crop_pct"):  # timm's name, which our exports use too
        data["eval_crop"] = preprocessor["crop_pct"]
    elif preprocessor:
        data["eval_crop"] = min(1.0, kept / resized) if resized and kept and crops else 1.0
    notes, filter = [], preprocessor.get("resample", BICUBIC)
    if size and not crops and not (isinstance(size, dict) and "shortest_edge" in size):
        notes.append("its processor stretches pictures; here they keep their aspect and are cropped to the centre")
    if filter != BICUBIC:
        notes.append(f"its processor resizes with resample={filter!r}; here by Pillow's bicubic filter")
    return data, notes


def _shorter_side(size: int | list | dict[str, int] | None) -> int | None:
    if isinstance(size, dict):
        size = [size[name] for name in ("shortest_edge", "height", "width") if size.get(name)]
    return min(size, default=None) if isinstance(size, list) else size


def make_preprocessor(model: MAEConfig, data: dict[str, Any]) -> dict[str, Any]:
    """The preprocessor_config.json with which transformers makes our pixels, from the settings `data.*`.

    Its BitImageProcessor resizes the shorter side and crops the centre. It cannot resize to cover a rectangle: for
    images that are not square it gets the size before the crop, which stretches pictures of another aspect.
    """
    height, width = model.image_size
    resized = {name: round(side / data["eval_crop"]) for name, side in (("height", height), ("width", width))}
    mean, std = (values * model.channels if len(values) == 1 else values for values in (data["mean"], data["std"]))
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
        "image_mean": list(mean),
        "image_std": list(std),
        "crop_pct": data["eval_crop"],  # not read by transformers: the sizes above are rounded
    }


def left_unsaid(model: MAEConfig) -> list[str]:
    """Notes on how transformers prepares pictures differently, which its file cannot express."""
    (height, width), notes = model.image_size, []
    if height != width:
        notes.append(f"transformers' processor stretches pictures whose aspect is not that of {height} x {width}")
    if model.channels == 1:
        notes.append("transformers' processor does not turn colours into grey: give it grey pictures")
    elif model.channels != 3:
        notes.append(f"transformers' processor takes grey and RGB pictures, none of {model.channels} channels")
    return notes
