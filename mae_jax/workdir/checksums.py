"""SHA256SUMS: the digests of a checkpoint's files as they were written, by which one changed bit is found.

It has the format of sha256sum, and can be checked without this program too, by `sha256sum --check SHA256SUMS` in the
folder. Its last line, a comment, is the digest of the others.
"""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mae_jax.runtime.errors import reason
from mae_jax.runtime.retry import with_patience
from mae_jax.workdir.writing import write_atomically

NAME = "SHA256SUMS"
THREADS = 4  # hashing leaves Python's lock to others


def write_manifest(folder: Path, skip: Iterable[str] = ()) -> None:
    """Writes the manifest of a folder; files that it lists already are not read again.

    Args:
      skip: names of files, relative to the folder, that are not ready yet.

    Raises:
      OSError: if a file cannot be read, or the manifest cannot be written.
    """
    digests = read_manifest(folder) or {}
    new = [name for name in _files(folder) if name not in digests and name not in skip]
    if not new:
        return
    with ThreadPoolExecutor(THREADS) as pool:
        digests |= zip(new, pool.map(lambda name: _digest(folder / name), new), strict=True)
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    write_atomically(folder / NAME, f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n")


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest, damaged or not."""
    return (folder / NAME).exists()


def read_manifest(folder: Path) -> dict[str, str] | None:
    """The listed digests by name, or None if there is no manifest, or one with other bytes than were written.

    Raises:
      OSError: if it cannot be read.
    """
    try:
        lines, seal, end = with_patience((folder / NAME).read_bytes).rpartition(b"# ")
    except FileNotFoundError:
        return None
    if not seal or end != hashlib.sha256(lines).hexdigest().encode() + b"\n":
        return None
    pairs = (line.split("  ", 1) for line in lines.decode().splitlines())
    return {name: digest for digest, name in pairs}


def find_damage(folder: Path, parts: Iterable[str] | None = None) -> str | None:
    """What is wrong with the files of a folder that has a manifest, in a few words; None: nothing.

    Args:
      parts: the only sub-folders to look into; None: everything.
    """
    try:
        digests = read_manifest(folder)
    except OSError as error:
        return f"{NAME} cannot be read: {reason(error)}"
    if digests is None:
        return f"{NAME} has other bytes than were written" if has_manifest(folder) else f"{NAME} is missing"
    if parts is not None:
        digests = {name: digest for name, digest in digests.items() if name.split("/", 1)[0] in parts}

    def check(name: str) -> str | None:
        try:
            same = with_patience(lambda: _digest(folder / name)) == digests[name]
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {reason(error)}"
        return None if same else f"{name} has other bytes than were written"

    with ThreadPoolExecutor(THREADS) as pool:
        return next(filter(None, pool.map(check, sorted(digests))), None)


def _files(folder: Path) -> list[str]:
    """The names of all files below a folder but the manifest, relative to it, with "/" in between."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    names = (file.relative_to(folder).as_posix() for file in found)
    return [name for name in names if name not in (NAME, NAME + ".tmp")]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
