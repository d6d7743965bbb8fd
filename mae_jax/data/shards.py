"""Which files of a folder hold which split: parquet and tar shards, by their names or folders."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from mae_jax.data.files import check_exists, first_few, list_pictures
from mae_jax.data.splits import TEST, TRAIN, VALIDATION
from mae_jax.runtime.errors import UserError

PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")


class Shard(NamedTuple):
    file: Path
    name: str  # relative to `data.path`, so that the data may move
    split: str | None  # as its name or folder tells; None: it tells none


def find_shards(data: ConfigDict, extension: str, what: str) -> list[Shard]:
    """The files with an extension at `data.path`, sorted.

    A split is the first word of the file's name, or else of a folder below `data.path`, that a setting names or that is
    a usual name of one, as in train-00000-of-00002.parquet and val/000.tar. Raises UserError if there is no such file,
    and for packed ones.
    """
    path = data.path
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
    usual = TRAIN + VALIDATION + TEST
    asked = [name for name in (data.train_split, data.eval_split) if name and name.lower() not in usual]
    return [Shard(root / name, name, _first_word(name, asked) or _first_word(name, usual)) for name in found]


def _first_word(name: str, words: Sequence[str]) -> str | None:
    """The first of the words in a file's name, or else in that of the innermost folder; train2017 has the word train.

    A word in other words, as in "contest", does not count; nor does a number in other numbers.
    """
    kinds = {word: [r"\d" if end.isdigit() else r"[^\W\d_]" for end in (word[0], word[-1])] for word in words}
    found = "|".join(f"(?<!{first}){re.escape(word)}(?!{last})" for word, (first, last) in kinds.items())
    matches = (re.search(found, part, re.IGNORECASE) for part in reversed(name.split(os.sep)) if found)
    return next((match[0] for match in matches if match), None)
