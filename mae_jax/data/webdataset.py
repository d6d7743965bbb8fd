"""Tar shards of WebDataset as a source, read by offset: `data.name=webdataset`."""

import errno
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.cache import entry_of, read_entry, write_entry
from mae_jax.data.files import first_few, is_picture_name
from mae_jax.data.rows import Rows, RowSource, find_column, find_label_columns
from mae_jax.data.shards import find_shards
from mae_jax.runtime.errors import UserError, first_line, reason

LARGEST_FIELD = 2**16  # bytes of a .json, .cls or .txt that can hold labels
FIELDS = ("cls", "txt", "json")


class WebDataset(RowSource):
    """The pictures in one tar or a folder of tars; for their splits see `find_shards`.

    Members whose names are alike up to the first dot of the base name belong together: a picture, and its fields in
    .cls, .txt, or those of the object in .json. They are what columns are to a table. An index of each tar is made once
    and kept in the cache. Raises UserError for tars that are compressed or cut short, and keys with several pictures.
    """

    @classmethod
    def read_rows(cls, data: ConfigDict) -> Rows:
        place, keys, members, splits, columns = str(data.path), [], [], [], {}
        shards = find_shards(data.path, ".tar", "uncompressed tars")
        for number, (file, split) in enumerate(shards):
            index = _index_of(file)
            for key, pictures in zip(index["keys"], index["pictures"], strict=True):
                members.append((number, *_choose(pictures, data.image_column, f"{file}: key {key}")))
            for name in {*columns, *index["fields"]}:
                column = columns.setdefault(name, [None] * len(keys))
                column += index["fields"].get(name) or [None] * len(index["keys"])
            keys += index["keys"]
            splits += [split] * len(index["keys"])
        reader = TarFiles([str(file) for file, _ in shards], np.array(members, np.int64).reshape(-1, 3), keys)
        by_column, groups = (
            find_column(columns, data, setting, place) for setting in ("data.split_column", "data.group_column")
        )
        if by_column and (data.split_column or not any(splits)):
            splits = columns[by_column]
        by_convention = data.label_column is None and "cls" in columns
        labelled = ["cls"] if by_convention else find_label_columns(columns, data, place)
        labels = {name: columns[name] for name in labelled}
        names = [f"{Path(file).name}/{key}" for file, key in zip(reader.files_of_rows(), keys, strict=True)]
        if len({*names}) < len(names):  # shards of one name in several folders
            names = list(map(os.path.join, reader.files_of_rows(), keys))
        return Rows(place, names, reader, labels, None, splits if any(splits) else None, columns.get(groups))


class TarFiles:
    """Pictures in tars: the `Reader` of their rows."""

    def __init__(self, tars: list[str], members: np.ndarray, keys: list[str]):
        """`members` int64 [n, 3]: the tar, and the picture's offset and size in it, bytes."""
        self._tars, self._members, self._keys = tars, members, keys

    def files_of_rows(self) -> list[str]:
        return [self._tars[number] for number in self._members[:, 0]]

    def read(self, row: int) -> bytes:
        number, offset, size = map(int, self._members[row])
        with open(self._tars[number], "rb") as file:
            file.seek(offset)
            found = file.read(size)
        if len(found) < size:
            raise OSError(errno.EBADMSG, "the tar is shorter than when it was indexed", self._tars[number])
        return found

    def name(self, row: int) -> str:
        return self.where(row)

    def where(self, row: int) -> str:
        return f"{self._tars[self._members[row, 0]]}: key {self._keys[row]}"


def _choose(pictures: list[tuple], wanted: str | None, where: str) -> tuple[int, int]:
    """Offset and size of the picture of a key, whose pictures are (extension, offset, size)."""
    found = [picture for picture in pictures if wanted in (None, picture[0])]
    if len(found) == 1:
        return tuple(found[0][1:])
    has = first_few([f".{extension}" for extension, *_ in pictures]) or "none"
    one = f"data.image_column={wanted}" if wanted else "one picture"
    remedy = f"set data.image_column to one of them, as {pictures[0][0]}" if len(found) > 1 else "remove the key"
    raise UserError(f"{where} should have {one}, but its pictures are {has}: {remedy}")


def _index_of(tar: Path) -> dict[str, Any]:
    """Keys of a tar, the pictures (extension, offset, size) of each, and fields: name -> a value for each key."""
    try:
        status = os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {reason(error)}") from error
    entry, stamp = entry_of("tar", tar), [status.st_size, status.st_mtime_ns]
    kept = read_entry(entry)
    if kept and kept["stamp"] == stamp:
        return kept
    try:
        index = _make_index(tar, status.st_size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{tar} cannot be read as an uncompressed tar: {first_line(error)}; decompress it, or make it again"
        ) from error
    write_entry(entry, index | {"stamp": stamp})
    return index


def _make_index(tar: Path, size: int) -> dict[str, Any]:
    pictures: dict[str, list] = {}
    facts: dict[str, dict] = {}
    with tarfile.open(tar, "r:") as archive:
        end = 0
        for member in archive:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if end > size:
                break
            folder, base = os.path.split(member.name)
            stem, _, extension = base.partition(".")
            if not member.isfile() or not stem:  # hidden files, such as macOS's
                continue
            key, extension = os.path.join(folder, stem), extension.lower()
            if is_picture_name(f".{extension}"):
                pictures.setdefault(key, []).append((extension, member.offset_data, member.size))
            elif extension in FIELDS and member.size <= LARGEST_FIELD:
                text = archive.extractfile(member).read().decode(errors="replace").strip()
                facts.setdefault(key, {}).update(_fields(extension, text))
        # Two blocks of zeros end an archive.
        archive.fileobj.seek(end)
        if end > size or archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"it is cut short, at {size:,} bytes")
    if lost := [key for key in facts if key not in pictures]:
        raise UserError(f"{tar}: the key {lost[0]} has no picture: remove it, or make the tar again")
    if not pictures:
        raise UserError(f"{tar} holds no picture, such as KEY.jpg")
    names = {name for fact in facts.values() for name in fact}
    fields = {name: [facts.get(key, {}).get(name) for key in pictures] for name in sorted(names)}
    return {"keys": list(pictures), "pictures": list(pictures.values()), "fields": fields}


def _fields(extension: str, text: str) -> dict[str, Any]:
    if extension != "json":
        return {extension: text}
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    found = found if isinstance(found, dict) else {"json": found}
    return {name: value for name, value in found.items() if isinstance(value, str | int | float | list)}
