"""Pictures with features, names and labels, to search in or to search with: computed here, or from a table."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import read_picture_file
from mae_jax.data.loader import make_eval_batches
from mae_jax.data.sources import Source, Wrapper
from mae_jax.evaluation.each_picture import features_of_each
from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.feature_table import TABLE, FeatureTable
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import escaped

READ_AT_ONCE = 64  # pictures


class Gallery(NamedTuple):
    """n pictures, in the order of their features."""

    names: list[str]  # escaped
    labels: list[str | None]  # class names; None: no label, or one of another kind than class
    vectors: np.ndarray  # float32 [n, D]
    source: Source
    places: np.ndarray  # int [n]: in the source

    @property
    def keys(self) -> list[str]:
        """The names, alike for a file however it was given."""
        return [os.path.abspath(name) for name in self.names]


class Files(Source):
    """Pictures in files, which may be gone, by their paths."""

    def __init__(self, files: Sequence[str], place: str):
        self._files, self.place = files, place

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        return {"image": read_picture_file(self._files[index]), "label": -1}

    def name_of(self, index: int) -> str:
        return self._files[index]


def of_table(table: FeatureTable, part: Wrapper) -> Gallery:
    """The pictures of a table, of all its splits, or a `part` of them: of its `Files`."""
    rows, names = part.indices, table.about["class_names"]
    labels = _names_of(table.labels[rows], names if table.about["label_kind"] == "class" else None)
    vectors = table.vectors if len(rows) == len(table.files) else table.vectors[rows]
    return Gallery([table.files[row] for row in rows.tolist()], labels, vectors, part, np.arange(len(rows)))


def of_pictures(source: Source, data: EvaluationData, state: Trained) -> tuple[Gallery, dict[str, str]]:
    """The usable pictures of a source with the features of `data`; and why others are left out, by name."""
    pictures = features_of_each(data, state, source)
    places, vectors, labels = [], [], []
    for index, (features, label) in pictures:
        places.append(index)
        vectors.append(features)
        labels.append(label)
    places, names = np.concatenate(places), source.class_names if source.label_kind == "class" else None
    found = Gallery(
        [escaped(source.file_of(place)) for place in places.tolist()],
        _names_of(np.concatenate(labels), names and [escaped(name) for name in names]),
        np.concatenate(vectors), source, places,
    )  # fmt: skip
    return found, {escaped(source.file_of(index)): escaped(why) for index, why in sorted(pictures.bad.items())}


def _names_of(labels: np.ndarray, names: Sequence[str] | None) -> list[str | None]:
    if not names:
        return [None] * len(labels)
    return [names[label] if label >= 0 else None for label in labels.tolist()]


def number_labels(*galleries: Gallery) -> list[np.ndarray]:
    """The labels of each gallery as numbers, int64 [n], alike for the same name; -1: none."""
    names = sorted({label for gallery in galleries for label in gallery.labels if label is not None})
    numbers = {name: number for number, name in enumerate(names)} | {None: -1}
    return [np.asarray([numbers[label] for label in gallery.labels], np.int64) for gallery in galleries]


def read_crops(config: ConfigDict, gallery: Gallery, rows: np.ndarray) -> Iterator[tuple[list[int], np.ndarray]]:
    """Batches of rows and their pictures [b, h, w, c], cut as for evaluation; those that cannot be read are missing."""
    rows = np.unique(rows)
    rows, model = rows[np.argsort(gallery.places[rows])], MAEConfig(**config.model)
    chosen = Wrapper(gallery.source, gallery.places[rows])
    reading = chosen, config.data, READ_AT_ONCE, model.image_size, model.channels
    with contextlib.closing(make_eval_batches(*reading, replaces=False)) as batches:
        for batch in batches:
            there = batch["weight"] > 0
            if there.any():
                yield rows[batch["index"][there]].tolist(), batch["image"][there]


def is_table(path: str | None) -> bool:
    """Whether a path is a table of features, or a folder with one, rather than a picture or a folder of pictures."""
    return path is not None and (path.endswith(".parquet") or Path(path, TABLE).is_file())
