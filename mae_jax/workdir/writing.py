"""Files of a workdir: whole whenever they exist, never written through a link, and read with care."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mae_jax.runtime.processes import only_main


def make_temporary(path: Path) -> Path:
    """A new, empty file beside `path`, to be filled and to take its place.

    Raises:
      OSError: if it cannot be made.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # so it is no link
    return temporary


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, to be filled and then to take its place, unless there is an error.

    Raises:
      OSError: if it cannot be made or moved; what was there is still there, and nothing else.
    """
    temporary = make_temporary(path)
    try:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file in its place that only its owner may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@only_main
def write_atomically(path: Path, text: str) -> None:
    """Writes a file, whole or not at all. Of several processes only the first does.

    Raises:
      OSError: if it cannot be written; what was there is still there, and nothing else.
    """
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: dict[str, Any]) -> Path:
    """Writes indented JSON as `write_atomically` does; returns the path.

    Raises:
      ValueError: for NaN and infinity, which JSON does not have; see `finite_or_null`.
    """
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
    return path


def finite_or_null(value: Any) -> Any:
    """The value with None, which is null in JSON, for each float in it that is not finite."""
    if isinstance(value, dict):
        return {key: finite_or_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a regular file; None if there is no such file, or anything else in it."""
    try:
        return parse_object(path.read_bytes()) if path.is_file() else None
    except OSError:
        return None


def parse_object(text: bytes | str) -> dict[str, Any] | None:
    """The JSON object that a text is; None if it is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
