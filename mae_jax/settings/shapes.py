"""The settings whose values are lists of a form of their own."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import FLOAT32_MAX, get


def _all(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(fits, value))


def _is_side(side: Any) -> bool:
    return type(side) is int and side > 0


def _is_size(size: Any) -> bool:
    return _is_side(size) or _all(size, _is_side) and len(size) == 2


# Setting -> whether a value fits, what it must be, an example.
SHAPES = {
    "init_channels": (
        lambda value: value in ("mean", "repeat") or _all(value, lambda old: old is None or type(old) is int),
        "mean, repeat, or for each channel its old one or None", "(2, 1, 0, None)",
    ),
    "data.bands": (
        lambda value: _all(value, lambda band: type(band) is int and band >= 0),
        "channels of the pictures, counted from 0", "(3, 2, 1)",
    ),
    "data.value_range": (
        lambda value: _all(value, lambda end: type(end) in (int, float) and abs(end) < FLOAT32_MAX)
        and len(value) == 2 and value[0] < value[1],
        "two numbers, (low, high) with low < high", "(0, 4095)",
    ),
    "reconstruct.outliers": (
        lambda value: value == () or value == [] or _all(value, lambda name: isinstance(name, str)),
        "names of classes", "('odd',)",
    ),
    "features.image_sizes": (
        lambda value: value == () or value == [] or _all(value, _is_size),
        "sizes, each one number or (height, width)", "(160, 224)",
    ),
    "evaluate.layers": (
        lambda value: _all(value, lambda group: _all(group, lambda layer: type(layer) is int)),
        "groups of blocks", "((6,), (-2, -1))",
    ),
}  # fmt: skip


def check_shapes(config: ConfigDict) -> None:
    """Raises UserError for a value that has not its setting's form."""
    for key, (fits, needed, example) in SHAPES.items():
        value = get(config, key)
        if value is not None and not fits(value):
            raise UserError(f"{key}={value!r} must be {needed}, for example --config.{key}='{example}'")
