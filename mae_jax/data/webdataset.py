"""Tar shards of WebDataset as a source, read by offset: `data.name=webdataset`."""

import errno
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from mae_jax.data.cache import entry_of, read_entry, write_entry
from mae_jax.data.files import EXTENSIONS, is_picture_name
from mae_jax.data.rows import USUAL_COLUMNS, Rows, RowSource, find_column, find_label_columns
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
        place, names, members, splits, columns = str(data.path), [], [], [], {}
        shards = find_shards(data, ".tar", "uncompressed tars")
        indices = [_index_of(shard.file, data) for shard in shards]
        there = dict.fromkeys(name for index in indices for name in index["fields"])
        wanted = data.image_column and data.image_column.lstrip(".").lower()
        by_custom = data.label_column is None and "cls" in there
        labels = ["cls"] if by_custom else find_label_columns(there, data, place)
        split, group = (find_column(there, data, f"data.{what}_column", place) for what in ("split", "group"))
        for number, (shard, index) in enumerate(zip(shards, indices, strict=True)):
            for key, pictures in zip(index["keys"], index["pictures"], strict=True):
                members.append((number, *_choose(pictures, wanted, f"{shard.file}: key {key}")))
                names.append(f"{shard.name}/{key}")
            splits += [shard.split] * len(index["keys"])
            for name in {*labels, split, group} - {None}:
                columns.setdefault(name, []).extend(index["fields"].get(name) or [None] * len(index["keys"]))
        if split and (data.split_column or not any(splits)):
            splits = columns[split]
        tars = [(str(shard.file), len(shard.name) + 1) for shard in shards]
        reader = TarFiles(tars, np.array(members), pa.array(map(os.fsencode, names), pa.large_binary()))
        cells = {name: columns[name] for name in labels}
        return Rows(place, names, reader, cells, None, splits if any(splits) else None, columns.get(group))


class TarFiles:
    """Pictures in tars: the `Reader` of their rows."""

    def __init__(self, tars: list[tuple[str, int]], members: np.ndarray, names: pa.Array):
        """`tars`: each with the place in its `names` where keys begin; `members` int64 [n, 3]: tar, offset, bytes."""
        self._tars, self._members, self._names = tars, members, names

    def read(self, row: int) -> bytes:
        number, offset, size = map(int, self._members[row])
        tar, _ = self._tars[number]
        with open(tar, "rb") as file:
            file.seek(offset)
            found = file.read(size)
        if len(found) < size:
            raise OSError(errno.EBADMSG, "the tar is shorter than when it was indexed", tar)
        return found

    def name(self, row: int) -> str:
        return self.where(row)

    def file(self, row: int) -> str:
        return self.name(row)

    def where(self, row: int) -> str:
        tar, begin = self._tars[self._members[row, 0]]
        return f"{tar}: key {os.fsdecode(self._names[row].as_py())[begin:]}"


def _choose(pictures: list[tuple], wanted: str | None, where: str) -> tuple[int, int]:
    """Offset and size of the picture of a key, whose pictures are (extension, offset, size)."""
    found = [picture for picture in pictures if wanted in (None, picture[0])]
    if len(found) == 1:
        return tuple(found[0][1:])
    has = " and ".join(f".{extension}" for extension, *_ in pictures)
    one = "one picture" if wanted is None else f"one .{wanted} (data.image_column)"
    remedy = f"set data.image_column to one of them, as {pictures[0][0]}"
    if len({extension for extension, *_ in found}) < len(found):
        remedy = "make the tar again with other keys (a key is the name up to the first dot)"
    raise UserError(f"{where} must have {one}, but it has {has}: {remedy}")


def _index_of(tar: Path, data: ConfigDict) -> dict[str, Any]:
    """Keys of a tar, the pictures (extension, offset, size) of each, and fields: name -> a value for each key.

    Fields that cannot be columns for labels, splits or groups have no values: captions would fill the memory.
    """
    try:
        status = os.stat(tar)
    except OSError as error:
        raise UserError(f"{tar} cannot be read: {reason(error)}") from error
    entry, stamp = entry_of("tar", tar), [status.st_size, status.st_mtime_ns, *EXTENSIONS]
    index = read_entry(entry)
    if not index or index["stamp"] != stamp:
        try:
            index = _make_index(tar, status.st_size) | {"stamp": stamp}
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(
                f"{tar} cannot be read as an uncompressed tar: {first_line(error)}; decompress it, or make it again"
            ) from error
        write_entry(entry, index)
    fields = {name: cells if _may_be_column(name, data) else [] for name, cells in index["fields"].items()}
    return index | {"fields": fields}


def _may_be_column(name: str, data: ConfigDict) -> bool:
    labels = [data.label_column] if isinstance(data.label_column, str) else data.label_column or ()
    usual = " ".join(names for setting, names in USUAL_COLUMNS.items() if setting != "data.image_column")
    return name.lower() in usual.split() or name in (*labels, data.split_column, data.group_column)


def _make_index(tar: Path, size: int) -> dict[str, Any]:
    pictures: dict[str, list] = {}
    facts: dict[str, dict] = {}
    with tarfile.open(tar, "r:") as archive:
        end = 0
        for member in archive:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if end > size:
                break
            folder, base = os.path.split(member.name.removeprefix("./"))
            stem, _, extension = base.partition(".")
            if not stem or member.isdir():  # hidden files, such as macOS's
                continue
            key, extension = os.path.join(folder, stem), extension.lower()
            if is_picture_name(f".{extension}"):
                if not member.isfile() or member.issparse():
                    raise UserError(f"{tar}: {member.name} is a link or has holes: make the tar again with whole files")
                pictures.setdefault(key, []).append((extension, member.offset_data, member.size))
            elif extension in FIELDS and member.isfile() and member.size <= LARGEST_FIELD:
                text = archive.extractfile(member).read().decode(errors="replace").strip()
                known, more = facts.setdefault(key, {}), _fields(extension, text)
                facts[key] = more | known if extension == "json" else known | more  # a member .cls is the label
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
