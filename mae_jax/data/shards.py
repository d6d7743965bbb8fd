"""Which files of a folder hold which split: parquet and tar shards, by their names or folders."""

import os
import re
from pathlib import Path

from mae_jax.data.files import check_exists, first_few
from mae_jax.data.splits import TEST, TRAIN, VALIDATION
from mae_jax.runtime.errors import UserError


def find_shards(path: str | None, extension: str, what: str) -> list[tuple[Path, str | None]]:
    """The files with an extension at `data.path`, sorted: (file, name of its split, None: it tells none).

    A split is the first word of the file's name, or else of a folder below `data.path`, that is a usual name of one, as
    in train-00000-of-00002.parquet and val/000.tar. Raises UserError if there is no such file.
    """
    if not path:
        raise UserError(f"data.path is not set: a folder of {what}, or one file ending in {extension}")
    check_exists(path)
    root = Path(path)
    if root.is_file():
        return [(root, None)]
    files = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.lower().endswith(extension) and not name.startswith(".")
    )
    if not files:
        others = sorted(name for name in os.listdir(root) if not name.startswith("."))
        raise UserError(f"data.path={path} holds no file ending in {extension}, but {first_few(others) or 'nothing'}")
    splits = [_split_of(file.relative_to(root)) for file in files]
    return list(zip(files, splits, strict=True))


def _split_of(file: Path) -> str | None:
    for part in (file.name, *file.parts[-2::-1]):
        for word in re.split(r"[^a-zA-Z]+", part):
            if word.lower() in TRAIN + VALIDATION + TEST:
                return word
    return None
