"""Masks that a user gives: an array in a file, or a function."""

import importlib.util
from pathlib import Path

import numpy as np

from mae_jax.models.masking import MaskFn, check_given_mask
from mae_jax.runtime.errors import UserError, first_line


def read_masks(given: str, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, int]:
    """The masks of `evaluate.mask` for `count` pictures: bool [count, L], True = hidden, and how many are visible.

    Args:
      given: FILE.npy, or FILE.py:FUNCTION; see `check_given_mask` for what they hold.

    Raises:
      UserError: if there is no such file or function, it fails, or its masks do not fit.
    """
    path, _, name = given.rpartition(":") if ".py:" in given else (given, "", "")
    try:
        mask = load_function(Path(path), name) if name else np.load(path, allow_pickle=False)
    except Exception as error:  # whatever a file that is no mask makes of it, or the user's own code
        raise UserError(
            f"evaluate.mask={given} cannot be read ({_named(error)}); give FILE.npy or FILE.py:FUNCTION"
        ) from error
    try:
        return check_given_mask(mask, count, grid)
    except UserError as error:
        raise UserError(f"evaluate.mask={given}: {error}") from error
    except Exception as error:
        if not callable(mask):
            raise
        raise UserError(f"evaluate.mask={given}: the function fails ({_named(error)}); mend it") from error


def _named(error: Exception) -> str:
    """The first line of an error's message; of Python code's errors with their type, without which few make sense."""
    line = first_line(error)
    return line if isinstance(error, OSError) or line == type(error).__name__ else f"{type(error).__name__}: {line}"


def load_function(path: Path, name: str) -> MaskFn:
    """The function of this name in a Python file."""
    spec = importlib.util.spec_from_file_location("given_masks", path)
    if spec is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
