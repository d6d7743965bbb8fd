"""Features of pictures with their names and labels, as one parquet table."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from mae_jax.data.sources import Source
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError, escaped, reason
from mae_jax.runtime.processes import is_main
from mae_jax.workdir.writing import replacing

TABLE = "features.parquet"
ABOUT = b"mae_jax"  # key of the table's metadata: JSON, see `FeatureTable.about`
COLUMNS = ("file", "split", "label", "index", "vector")


class FeatureTable(NamedTuple):
    """n pictures and their features."""

    files: list[str]
    splits: list[str]  # train or eval
    labels: np.ndarray  # as `Source.labels`
    index: np.ndarray  # int64 [n]: place among the pictures of the split that were chosen
    vectors: np.ndarray  # float32 [n, D]; of patch tokens D = L * width
    about: dict[str, Any]  # label_kind, class_names (None: no labels), shape of a vector, and how features were made


def describe_encoder(config: ConfigDict, step: int) -> dict[str, Any]:
    """What features depend on, for `FeatureTable.about`."""
    size = list(MAEConfig(**config.model).image_size)
    chosen = {"token": config.evaluate.token, "layer": config.evaluate.layer, "image_size": size}
    return {"init_from": config.init_from, "step": step} | chosen


def check_encoder(table: FeatureTable, about: dict[str, Any], where: str) -> None:
    """Raises UserError unless the features of a table, `where` it is, are those of the encoder `about` describes."""
    for name, expected in about.items():
        found = table.about.get(name)
        same = _same_place(found, expected) if name == "init_from" else found == expected
        if not same:
            raise UserError(
                f"{where} has features of another encoder ({name}={found}, here {expected}): write it by "
                "configs/features.py with the settings used here, or give the pictures"
            )


def _same_place(one: Any, other: Any) -> bool:
    """Whether two settings `init_from` name the same weights, if their steps are the same."""
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return one == other or _without_step(one) == _without_step(other)


def _without_step(path: str) -> str:
    real = os.path.realpath(path)
    folder, step = os.path.split(real)
    return os.path.dirname(folder) if step.isdigit() and os.path.basename(folder) == "checkpoints" else real


WriteRows = Callable[[str, Source, np.ndarray, np.ndarray, np.ndarray], None]


@contextlib.contextmanager
def writing_features(path: Path, source: Source, shape: Sequence[int], about: dict[str, Any]) -> Iterator[WriteRows]:
    """A context that yields a function which adds rows; the table is whole or not there, in process 0 only.

    Rows are (split, its source, indices [n], labels [n] or [n, K], features [n, *shape]). `source` has the labels' kind
    and names.
    """
    if not is_main():
        yield lambda *rows: None
        return
    names = [escaped(name) for name in source.class_names or ()]
    about = about | {"label_kind": source.label_kind, "class_names": names or None, "shape": list(shape)}
    of_classes, size = source.label_kind == "class", int(np.prod(shape))
    label_type = pa.string() if of_classes else pa.list_(pa.float32(), len(names))
    types = [pa.string(), pa.string(), label_type, pa.int64(), pa.list_(pa.float32(), size)]
    schema = pa.schema(zip(COLUMNS, types, strict=True), {ABOUT: json.dumps(about)})

    def write_rows(split: str, source: Source, index: np.ndarray, labels: np.ndarray, features: np.ndarray) -> None:
        if of_classes:
            told = pa.array([names[label] if label >= 0 else None for label in labels], pa.string())
        else:
            # Pictures of a split without labels have none of the other's.
            known = labels if labels.shape[1:] == (len(names),) else np.full((len(labels), len(names)), np.nan)
            told = _lists(known, len(names))
        files = [escaped(source.file_of(place)) for place in index.tolist()]
        columns = [files, [split] * len(files), told, pa.array(index, pa.int64()), _lists(features, size)]
        if files:
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))

    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        yield write_rows


def _lists(rows: np.ndarray, size: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(np.float32).ravel()), size)


def read_features(path: str | Path) -> FeatureTable:
    """A table that `writing_features` wrote: the file, or features.parquet in a folder. UserError for anything else."""
    path = Path(path)
    path = path / TABLE if path.is_dir() else path
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{path} is no table of features ({reason(error)}): write one by configs/features.py"
        ) from error
    about = (table.schema.metadata or {}).get(ABOUT)
    if about is None or tuple(table.column_names) != COLUMNS:
        raise UserError(f"{path} is no table of features: write one by configs/features.py")
    about = json.loads(about)
    names, (files, splits, told, index, vectors) = about["class_names"] or (), table.columns
    if about["label_kind"] == "class":
        places = {name: place for place, name in enumerate(names)} | {None: -1}
        labels = np.asarray([places[name] for name in told.to_pylist()], np.int64)
    else:
        labels = _rows(told, len(names))
    size = int(np.prod(about["shape"]))
    return FeatureTable(files.to_pylist(), splits.to_pylist(), labels, index.to_numpy(), _rows(vectors, size), about)


def _rows(column: pa.ChunkedArray, size: int) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
