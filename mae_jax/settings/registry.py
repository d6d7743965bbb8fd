"""Registries: what a setting names, such as mask samplers, and how others add their own."""

import importlib
from collections.abc import Callable
from typing import Generic, TypeVar

from mae_jax.runtime.errors import UserError, first_line
from mae_jax.settings.suggestions import nearest

T = TypeVar("T")


class Registry(dict[str, T], Generic[T]):
    """Name -> implementation, for the values of one setting.

    `setting` is its dotted key. Values of the form "module:name" are imported, so that a project's own need not be
    registered at all.
    """

    def __init__(self, setting: str):
        super().__init__()
        self._setting = setting

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers a function or class under a name."""

        def add(implementation: T) -> T:
            self[name] = implementation
            return implementation

        return add

    def find(self, name: str) -> T:
        """The implementation with this name.

        Raises:
          UserError: for a name that is not registered, or a "module:name" that cannot be imported.
        """
        module, _, attribute = str(name).partition(":")
        if not attribute:
            if name not in self:
                raise UserError(f"{self._setting}={name!r} is not one of {', '.join(self)}{nearest(str(name), self)}")
            return self[name]
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{self._setting}={name} cannot be imported: {first_line(error)}") from error
