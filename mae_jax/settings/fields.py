"""The defaults of all settings, and conversions: by dotted key, flat, and to and from JSON."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

INT32_MAX = 2**31 - 1

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


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 1}} -> {"train.steps": 1}; tuples become lists, as in JSON."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _swap(value, tuple, list)
    return flat


def from_dict(values: dict) -> dict:
    """A config read from JSON, with lists turned back into tuples."""
    return {
        key: from_dict(value) if isinstance(value, dict) else _swap(value, list, tuple) for key, value in values.items()
    }


def _swap(value: Any, old: type, new: type) -> Any:
    """The value with all its `old` sequences, at any depth, converted to `new`."""
    return new(_swap(item, old, new) for item in value) if isinstance(value, old) else value
