"""Reading and writing single files: atomically, and never through a link."""

import contextlib
import csv
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mae_jax.runtime.processes import is_main


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A context that yields a new, empty file, moved to `path` at the end, or deleted after an error."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # O_EXCL: it is no link
    try:
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors replaces it by a file that only its owner may read
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file completely or not at all, in process 0 only."""
    if is_main():
        with replacing(path) as temporary:
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def writing_table(path: Path, header: Sequence[str]) -> Iterator[Callable[[Sequence], None]]:
    """A context that yields a function which adds a row to a CSV file; whole or not there, in process 0 only."""
    if not is_main():
        yield lambda row: None
        return
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        yield writer.writerow
        file.flush()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes indented JSON atomically. ValueError for NaN and infinity; see `finite_or_null`."""
    write_atomically(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows of the same keys atomically, below a line of these; None is an empty cell."""
    with writing_table(path, list(rows[0])) as write_row:
        for row in rows:
            write_row(list(row.values()))


def save_picture(path: Path, picture: np.ndarray) -> Path:
    """Writes a picture [H, W, 3] uint8 as PNG, atomically; makes its folder, returns its path."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(picture).save(png, format="PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png.getvalue())
    return path


def free_name(path: Path) -> Path:
    """The path if nothing is there, otherwise with the lowest free number: metrics.1.jsonl."""
    numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in itertools.chain([path], numbered) if not os.path.lexists(name))


def finite_or_null(value: Any) -> Any:
    """The value with each non-finite float replaced by None (null in JSON)."""
    if isinstance(value, dict):
        return {key: finite_or_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a regular file; None if there is no such file or object."""
    with contextlib.suppress(OSError):
        return parse_object(path.read_bytes()) if path.is_file() else None


def parse_object(text: bytes | str) -> dict[str, Any] | None:
    """The JSON object in a text; None for anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None
