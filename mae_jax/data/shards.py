"""Which files of a folder hold which split: parquet and tar shards, by their names or folders."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from mae_jax.data.files import check_exists, first_few, list_pictures
from mae_jax.data.splits import TEST, TRAIN, VALIDATION
from mae_jax.runtime.errors import UserError

PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


class Shard(NamedTuple):
    file: Path
    name: str  # relative to `data.path`, so that the data may move
    split: str | None  # as its name or folder tells; None: it tells none


def find_shards(path: str | None, extension: str, what: str) -> list[Shard]:
    """The files with an extension at `data.path`, sorted.

    A split is the first word of the file's name, or else of a folder below `data.path`, that is a usual name of one, as
    in train-00000-of-00002.parquet and val/000.tar. Raises UserError if there is no such file, and for packed ones.
    """
    if not path:
        raise UserError(f"data.path is not set: a folder of {what}, or one file ending in {extension}")
    check_exists(path)
    root = Path(path)
    if root.is_file():
        return [Shard(root, root.name, None)]
    endings = tuple(extension + end for end in PACKED) + (".tgz",) * (extension == ".tar")
    found = list_pictures(root, extensions=(extension, *endings)).files
    if packed := [name for name in found if name.lower().endswith(endings)]:
        raise UserError(f"data.path={path} must hold {what}: unpack {first_few(packed)}, or move it elsewhere")
    if not found:
        others = sorted(name for name in os.listdir(root) if not name.startswith("."))
        raise UserError(f"data.path={path} holds no file ending in {extension}, but {first_few(others) or 'nothing'}")
    return [Shard(root / name, name, _split_of(Path(name))) for name in found]


def _split_of(name: Path) -> str | None:
    for part in (name.name, *name.parts[-2::-1]):
        for word in re.split(r"[^a-zA-Z]+", part):
            if word.lower() in TRAIN + VALIDATION + TEST:
                return word
    return None
