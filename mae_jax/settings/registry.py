"""Registries of implementations that a setting can name, such as mask samplers."""

import importlib
from collections.abc import Callable
from typing import Generic, TypeVar

from mae_jax.runtime.errors import UserError, first_line
from mae_jax.settings.suggestions import nearest

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Name -> implementation, for one setting, given by its dotted key.

    A name "module:name" is imported, without registration. An implementation may be such a string, imported on demand.
    """

    def __init__(self, setting: str):
        super().__init__()
        self._setting = setting

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator: registers a function or class under a name."""

        def add(implementation: T) -> T:
            self[name] = implementation
            return implementation

        return add

    def find(self, name: str) -> T:
        """The implementation with this name; UserError if it is unknown or cannot be imported."""
        found = self.get(name, str(name))
        if not isinstance(found, str):
            return found
        module, _, attribute = found.partition(":")
        if not attribute:
            raise UserError(f"{self._setting}={name!r} is not one of {', '.join(self)}{nearest(found, self)}")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{self._setting}={name} cannot be imported: {first_line(error)}; put its file beside main.py or on "
                "PYTHONPATH, and name what it defines"
            ) from error
