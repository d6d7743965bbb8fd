"""The defaults of all settings, and conversions: by dotted key, flat, and to and from JSON."""

from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3.4e38  # runs compute in float32

_make_defaults: Callable[[], ConfigDict] | None = None


def use_defaults(make: Callable[[], ConfigDict]) -> None:
    """Registers `get_config` of configs/common.py, which the package itself does not import."""
    global _make_defaults
    _make_defaults = make


def defaults() -> ConfigDict:
    """A new config with every setting at its default."""
    if _make_defaults is None:
        raise RuntimeError("call mae_jax.settings.fields.use_defaults(configs.common.get_config) first")
    return _make_defaults()


def get(config: Any, key: str) -> Any:
    """The value of a dotted key such as `train.steps`."""
    for part in key.split("."):
        config = config[part]
    return config


def flatten(config: dict) -> dict[str, Any]:
    """{"train": {"steps": 1}} -> {"train.steps": 1}; tuples become lists, as in JSON."""
    return _swap(flatten_dict(config, sep="."), tuple, list)


def from_dict(values: dict) -> dict:
    """A config read from JSON, with lists turned back into tuples."""
    return _swap(values, list, tuple)


def _swap(value: Any, old: type, new: type) -> Any:
    """The value with all its `old` sequences, at any depth, converted to `new`."""
    if isinstance(value, dict):
        return {key: _swap(part, old, new) for key, part in value.items()}
    return new(_swap(item, old, new) for item in value) if isinstance(value, old) else value
