"""What is slow to find out about data and does not change with them, such as a long listing: kept between runs."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack

VERSION = 1  # of the contents' layout


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/mae_jax`, or that in ~/.cache; without a home a place where nothing can be written."""
    home = os.path.expanduser("~")
    usual = os.devnull if home == "~" else os.path.join(home, ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual, "mae_jax")


def entry_of(kind: str, path: str | Path, *more: str) -> Path:
    """The cache's file for something about a path; `more` tells apart what there is of the same kind."""
    name = "\0".join([os.path.abspath(path), *more])
    return cache_folder() / f"{kind}-{hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()}"


def read_entry(entry: Path) -> Any:
    """What `write_entry` has written; None if there is nothing, nothing whole, or what another version wrote."""
    try:
        found = msgpack.unpackb(entry.read_bytes(), strict_map_key=False, unicode_errors="surrogateescape")
        return found["content"] if found["version"] == VERSION else None
    except (OSError, ValueError, TypeError, KeyError, msgpack.UnpackException):
        return None


def write_entry(entry: Path, content: Any) -> None:
    """Writes plain values, or nothing if they, or the cache, cannot be written."""
    with contextlib.suppress(OSError, ValueError, OverflowError):  # text and integers that msgpack does not have
        whole = {"version": VERSION, "content": content}
        write_bytes(entry, [msgpack.packb(whole, unicode_errors="surrogateescape")])


def write_bytes(entry: Path, parts: Iterable[bytes]) -> None:
    """Writes a file whole or not at all; several processes may write the same. Raises OSError."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
        try:
            file.writelines(parts)
            file.close()
            os.replace(file.name, entry)
        except BaseException:
            os.unlink(file.name)
            raise
