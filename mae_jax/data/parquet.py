"""Parquet files of Hugging Face's datasets as a source: `data.name=parquet`."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from mae_jax.data.files import first_few
from mae_jax.data.hub import HUB, rows_of_hub
from mae_jax.data.row_groups import Footer, RowGroups
from mae_jax.data.rows import Rows, RowSource, find_column, find_label_columns
from mae_jax.data.shards import find_shards
from mae_jax.runtime.errors import UserError, first_line


class Parquet(RowSource):
    """The pictures in one parquet file, in a folder of them (`find_shards`), or in a data set of the hub.

    A column of bytes, or of structs with `bytes` and `path`, holds the pictures; others, as in tables, labels, splits
    and groups. Names of classes are those of Hugging Face's ClassLabel in the schema. For how a picture is read see
    `RowGroups`. Raises UserError.
    """

    @classmethod
    def read_rows(cls, data: ConfigDict) -> Rows:
        if str(data.path).startswith(HUB):
            return rows_of_hub(data)
        place = str(data.path)
        shards = find_shards(data, ".parquet", "parquet files")
        footers = {str(shard.file): _read_footer(shard.file) for shard in shards}
        first, schema = next((file, footer.schema) for file, footer in footers.items())
        columns = schema.names
        image = _image_column(schema, data, place)
        _check_bytes(footers, image)
        labels = find_label_columns([name for name in columns if name != image], data, place)
        classes = _class_names(schema, labels)
        for file, (other, _) in footers.items():
            if other.names != columns:
                raise UserError(f"{file} has the columns {first_few(other.names)}, but {first} has "
                                f"{first_few(columns)}: name a folder of files that are alike")  # fmt: skip
            if _class_names(other, labels) != classes:
                raise UserError(f"{file} has other classes than {first}: name a folder of files that are alike")
        by_column, group = (find_column(columns, data, f"data.{name}_column", place) for name in ("split", "group"))
        counts = [footer.metadata.num_rows for footer in footers.values()]
        splits = [shard.split for shard, count in zip(shards, counts, strict=True) for _ in range(count)]
        if by_column and (data.split_column or not any(splits)):
            splits = _column(footers, by_column)
        names = [f"{shard.name}/{row}" for shard, count in zip(shards, counts, strict=True) for row in range(count)]
        reader = RowGroups(footers, image)
        cells, groups = {name: _column(footers, name) for name in labels}, group and _column(footers, group)
        notes = reader.check_room(footers)
        return Rows(place, names, reader, cells, classes, splits if any(splits) else None, groups, tuple(notes))


def _read_footer(file: Path) -> Footer:
    try:
        with pq.ParquetFile(file) as opened:
            return Footer(opened.schema_arrow, opened.metadata)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as parquet ({first_line(error)}): make or download it again") from error


def _column(footers: dict[str, Footer], name: str) -> list[Any]:
    cells = []
    for file, footer in footers.items():
        try:
            with pq.ParquetFile(file, metadata=footer.metadata) as opened:
                cells += opened.read([name])[name].to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: the column {name} is damaged ({first_line(error)}): download it again") from error
    return cells


def _image_column(schema: pa.Schema, data: ConfigDict, place: str) -> str:
    """The column with pictures; UserError if there is none, or if it is not clear which is meant."""

    def holds_pictures(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return any(field.name == "bytes" and holds_pictures(field.type) for field in kind)
        return str(kind) in ("binary", "large_binary", "binary_view")

    found = [field.name for field in schema if holds_pictures(field.type)]
    if not found or data.image_column and data.image_column not in found:
        asked = f"data.image_column={data.image_column}: " if found else ""
        has = f"only {first_few(found)}" if found else "no column"
        raise UserError(
            f"{asked}{place}: {has} has pictures, as bytes or structs of bytes and path; its columns are "
            f"{first_few(schema.names)}: set data.image_column, or data.name=table for files that a column names"
        )
    name = find_column(found, data, "data.image_column", place)
    if not name and len(found) > 1:
        raise UserError(f"{place}: which of {first_few(found)} has the pictures? Set data.image_column")
    return name or found[0]


def _check_bytes(footers: dict[str, Footer], column: str) -> None:
    """Raises UserError if the statistics of a first row group say that structs hold only paths."""
    for file, (_, metadata) in footers.items():
        group = metadata.row_group(0) if metadata.num_row_groups else None
        for number in range(group.num_columns if group else 0):
            facts = group.column(number)
            empty = facts.statistics and facts.statistics.null_count == group.num_rows
            if facts.path_in_schema in (f"{column}.bytes", column) and group.num_rows and empty:
                raise UserError(
                    f"{file}: the column {column} has no bytes, only paths of files elsewhere: save the data set "
                    "with its pictures embedded, or make a table of the files (data.name=table)"
                )


def _class_names(schema: pa.Schema, columns: list[str]) -> list[str] | None:
    """The names of a ClassLabel column in the metadata that Hugging Face's datasets writes; None if there are none."""

    def names(feature: Any) -> list[str] | None:
        if isinstance(feature, list):  # a list of labels, in one of three spellings
            return names(feature[0])
        return isinstance(feature, dict) and (feature.get("names") or names(feature.get("feature"))) or None

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return names(features[columns[0]]) if len(columns) == 1 else None
    except (ValueError, LookupError, TypeError):  # others write such metadata, too
        return None
