"""Parquet files of Hugging Face's datasets as a source: `data.name=parquet`."""

import errno
import importlib.util
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from mae_jax.data.cache import entry_of, write_bytes
from mae_jax.data.files import first_few, read_picture_file
from mae_jax.data.rows import Rows, RowSource, find_column, find_label_columns
from mae_jax.data.shards import find_shards
from mae_jax.runtime.errors import UserError, first_line

HUB = "hf://"


class Parquet(RowSource):
    """The pictures in one parquet file, in a folder of them (`find_shards`), or in a data set of the hub.

    A column of bytes, or of structs with `bytes` and `path`, holds the pictures; others, as in tables, labels, splits
    and groups. Names of classes are those of Hugging Face's ClassLabel in the schema. Since parquet cannot be read row
    by row, a row group is unpacked into the cache when its first picture is needed. Raises UserError.
    """

    @classmethod
    def read_rows(cls, data: ConfigDict) -> Rows:
        if str(data.path).startswith(HUB):
            return _from_hub(data)
        place = str(data.path)
        shards = find_shards(data.path, ".parquet", "parquet files")
        opened = [_open(file) for file, _ in shards]
        schema = opened[0].schema_arrow
        for (file, _), other in zip(shards, opened, strict=True):
            if other.schema_arrow.names != schema.names:
                raise UserError(f"{file} has the columns {first_few(other.schema_arrow.names)}, but {shards[0][0]} has "
                                f"{first_few(schema.names)}: name a folder of files that are alike")  # fmt: skip
        image = _image_column(schema, data, place)
        groups = [(number, group) for number, file in enumerate(opened) for group in range(file.num_row_groups)]
        counts = [opened[number].metadata.row_group(group).num_rows for number, group in groups]
        starts = np.cumsum([0, *counts])
        reader = RowGroups([str(file) for file, _ in shards], image, np.array(groups), starts)
        _check_bytes(opened, image, place)
        others = [name for name in schema.names if name != image]
        labels = find_label_columns(others, data, place)
        by_column, group = (find_column(others, data, f"data.{name}_column", place) for name in ("split", "group"))
        splits = [split for (_, split), file in zip(shards, opened, strict=True) for _ in range(file.metadata.num_rows)]
        if by_column and (data.split_column or not any(splits)):
            splits = _column(opened, by_column)
        names = [
            f"{Path(file).name}/{row}"
            for (file, _), one in zip(shards, opened, strict=True)
            for row in range(one.metadata.num_rows)
        ]
        if len({file.name for file, _ in shards}) < len(shards):  # in several folders
            names = [f"{row}/{name}" for row, name in enumerate(names)]
        columns = {name: _column(opened, name) for name in labels}
        classes = class_label(json.loads((schema.metadata or {}).get(b"huggingface", b"{}")), labels)
        groups = group and _column(opened, group)
        return Rows(place, names, reader, columns, classes, splits if any(splits) else None, groups)


class RowGroups:
    """Pictures in row groups of parquet files: the `Reader` of their rows."""

    def __init__(self, files: list[str], column: str, groups: np.ndarray, starts: np.ndarray):
        """`groups` int [g, 2]: file and row group in it; `starts` int [g + 1]: the first row of each."""
        self._files, self._column, self._groups, self._starts = files, column, groups, starts
        self._forget()

    def _forget(self) -> None:
        self._unpacked: dict[int, tuple[Path, np.ndarray]] = {}  # file and offsets of a row group's pictures
        self._locks, self._lock = {}, threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_unpacked", "_locks", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def read(self, row: int) -> bytes:
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        if group not in self._unpacked:
            with self._lock:
                lock = self._locks.setdefault(group, threading.Lock())
            with lock:  # others wait for the one that unpacks
                self._unpacked[group] = self._unpack(group)
        path, offsets = self._unpacked[group]
        start, end = map(int, offsets[row - self._starts[group] :][:2])
        try:
            with open(path, "rb") as file:
                file.seek(start)
                found = file.read(end - start)
        except FileNotFoundError:  # someone has emptied the cache
            self._unpacked[group] = self._unpack(group)
            raise
        if not found:
            raise OSError(errno.ENODATA, "the row has no picture")
        return found

    def _unpack(self, group: int) -> tuple[Path, np.ndarray]:
        """The cache's file with the pictures of a row group, one after the other after their offsets, int64 [n + 1]."""
        number, place = map(int, self._groups[group])
        count, status = int(self._starts[group + 1] - self._starts[group]), os.stat(self._files[number])
        name = f"{self._column}-{status.st_size}-{status.st_mtime_ns}-{place:06d}"
        path = entry_of("parquet", self._files[number]) / name
        if not path.exists():
            try:
                column = pq.ParquetFile(self._files[number]).read_row_group(place, [self._column])[self._column]
            except (pa.ArrowException, OSError) as error:
                raise OSError(errno.EBADMSG, f"row group {place} is damaged: {first_line(error)}") from error
            cells = [cell["bytes"] if isinstance(cell, dict) else cell for cell in column.to_pylist()]
            sizes = [len(cell or b"") for cell in cells]
            write_bytes(path, np.cumsum([8 * (count + 1), *sizes], dtype=np.int64).tobytes(), *filter(None, cells))
        return path, np.fromfile(path, np.int64, count + 1)

    def name(self, row: int) -> str:
        return self.where(row)

    def where(self, row: int) -> str:
        group = int(np.searchsorted(self._starts, row, "right")) - 1
        number = self._groups[group, 0]
        first = self._starts[np.flatnonzero(self._groups[:, 0] == number)[0]]
        return f"row {row - first + 1} of {self._files[number]}"


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet ({first_line(error)}): make or download it again") from error


def _column(files: list[pq.ParquetFile], name: str) -> list[Any]:
    return [cell for file in files for cell in file.read([name])[name].to_pylist()]


def _image_column(schema: pa.Schema, data: ConfigDict, place: str) -> str:
    """The column with pictures; UserError if there is none, or if it is not clear which is meant."""

    def holds_pictures(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return "bytes" in [kind.field(number).name for number in range(kind.num_fields)]
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in schema if holds_pictures(field.type)]
    if data.image_column and data.image_column not in found and data.image_column in schema.names:
        found = []
    name = find_column(found or schema.names, data, "data.image_column", place)
    if found and (name or len(found) == 1):
        return name or found[0]
    what = f"which of {first_few(found)} has the pictures" if found else (
        f"no column has pictures as bytes, or as structs of bytes and path: it has {first_few(schema.names)}"
    )  # fmt: skip
    raise UserError(f"{place}: {what}: set data.image_column" + ("" if found else ", or data.name=table for paths"))


def _check_bytes(files: list[pq.ParquetFile], column: str, place: str) -> None:
    """Raises UserError if the statistics say that structs hold only paths."""
    for file in files:
        for group in range(min(1, file.num_row_groups)):
            facts = file.metadata.row_group(group)
            for number in range(facts.num_columns):
                found = facts.column(number)
                empty = found.statistics and found.statistics.null_count == facts.num_rows
                if found.path_in_schema in (f"{column}.bytes", column) and facts.num_rows and empty:
                    raise UserError(
                        f"{place}: the column {column} has no bytes, only paths of files elsewhere: save the data set "
                        "with its pictures embedded, or make a table of the files (data.name=table)"
                    )


def class_label(metadata: dict, columns: list[str]) -> list[str] | None:
    """The names of a ClassLabel column in the metadata that Hugging Face's datasets writes; None if there are none."""

    def names(feature: Any) -> list[str] | None:
        if isinstance(feature, list):  # a list of labels, in one of three spellings
            return names(feature[0])
        return isinstance(feature, dict) and (feature.get("names") or names(feature.get("feature"))) or None

    features = metadata.get("info", {}).get("features", {})
    return names(features.get(columns[0])) if len(columns) == 1 else None


class HubRows:
    """Pictures of a data set that Hugging Face's `datasets` has opened: the `Reader` of their rows."""

    def __init__(self, splits: list[Any], column: str, place: str):
        self._splits, self._column, self._place = splits, column, place
        self._starts = np.cumsum([0, *map(len, splits)])

    def read(self, row: int) -> bytes:
        split = int(np.searchsorted(self._starts, row, "right")) - 1
        found = self._splits[split][row - int(self._starts[split])][self._column]
        if found["bytes"] is None:
            return read_picture_file(found["path"])
        return found["bytes"]

    def name(self, row: int) -> str:
        return self.where(row)

    def where(self, row: int) -> str:
        return f"row {row + 1} of {self._place}"


def _from_hub(data: ConfigDict) -> Rows:
    """The rows of hf://OWNER/NAME or hf://OWNER/NAME/CONFIG, downloaded by `datasets` into its own cache."""
    place, names = data.path, data.path.removeprefix(HUB).split("/")
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data.path={place} needs a package: pip install datasets")
    if len(names) not in (1, 2, 3):
        raise UserError(f"data.path={place} is no name of the hub: hf://OWNER/NAME, or hf://OWNER/NAME/CONFIG")
    import datasets

    try:
        found = datasets.load_dataset("/".join(names[:2]), *names[2:])
    except Exception as error:  # of many types, for a wrong name or no network
        raise UserError(f"data.path={place} cannot be loaded by datasets: {first_line(error)}") from error
    return rows_of_dataset(found, data, place)


def rows_of_dataset(found: Any, data: ConfigDict, place: str) -> Rows:
    """The rows of a `datasets.DatasetDict`."""
    import datasets

    features = next(iter(found.values())).features
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = find_column(images, data, "data.image_column", place) or next(iter(images), None)
    if image is None:
        raise UserError(f"{place} has no column of pictures, only {first_few(list(features))}")
    undecoded = found.cast_column(image, datasets.Image(decode=False))
    others = [name for name in features if name != image]
    labels, group = find_label_columns(others, data, place), find_column(others, data, "data.group_column", place)

    def column(name: str) -> list[Any]:
        return [cell for split in found.values() for cell in split[name]]

    splits = [name for name, split in found.items() for _ in range(len(split))]
    splits = column(data.split_column) if data.split_column else splits
    feature = features[labels[0]] if len(labels) == 1 else None
    classes = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    reader = HubRows([undecoded[name].select_columns([image]) for name in found], image, place)
    names = [f"{name}/{row}" for name, split in found.items() for row in range(len(split))]
    return Rows(place, names, reader, {name: column(name) for name in labels}, classes, splits, group and column(group))
