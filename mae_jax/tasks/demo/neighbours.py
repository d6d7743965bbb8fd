"""Nearest neighbours of a picture in an index of features."""

from typing import Any, NamedTuple

import numpy as np

from mae_jax.evaluation.feature_table import check_encoder, read_features
from mae_jax.runtime.errors import UserError


class Neighbour(NamedTuple):
    """A picture of an index."""

    file: str
    split: str
    label: str | None  # the name of its class
    index: int  # the picture's place in its split, perhaps
    cosine: float


class Index:
    """The pictures of a table of features (`read_features`); UserError unless the `about` encoder has written it."""

    def __init__(self, path: str, about: dict[str, Any]):
        try:
            table = read_features(path)
        except UserError as error:
            raise UserError(f"demo.index={path}: {error}") from error
        check_encoder(table, about, f"demo.index={path}")
        if not len(table.files):
            raise UserError(f"demo.index={path} has no pictures: write it by configs/features.py")
        names, classes = table.about["class_names"], table.about["label_kind"] == "class"
        self._labels = [names[label] if classes and names and label >= 0 else None for label in table.labels]
        self._vectors, self._table = _unit(table.vectors), table

    def __len__(self) -> int:
        return len(self._vectors)

    def nearest(self, feature: np.ndarray, count: int) -> list[Neighbour]:
        """The `count` rows with the largest cosine to a feature [width], nearest first; of equals, earlier ones."""
        cosines = self._vectors @ _unit(feature[None])[0]
        best = np.argsort(-cosines, kind="stable")[:count]
        return [
            Neighbour(self._table.files[n], self._table.splits[n], self._labels[n], int(self._table.index[n]),
                      float(cosines[n]))
            for n in best.tolist()
        ]  # fmt: skip


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
