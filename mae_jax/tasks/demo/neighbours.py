"""Nearest neighbours of a picture in an index of features."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mae_jax.runtime.errors import UserError, first_line

FILE = "features.parquet"
COLUMNS = ("file", "split", "label", "index", "vector")


class Neighbour(NamedTuple):
    """A picture of an index."""

    file: str
    split: str
    label: Any
    index: int  # the picture's place in its split
    cosine: float


class Index:
    """The rows of `folder`/features.parquet; UserError unless each has a vector of `width` finite numbers."""

    def __init__(self, folder: str, width: int):
        path, setting = Path(folder) / FILE, f"demo.index={folder}"
        try:
            table = pq.read_table(path, columns=list(COLUMNS))
            vectors = table["vector"].combine_chunks()
            flat = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            lengths = np.asarray(vectors.value_lengths()) if len(vectors) else np.zeros(0)
        except (OSError, pa.ArrowException, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{setting}: {path} is no index ({first_line(error)}); write one by features") from error
        if not len(lengths) or set(lengths.tolist()) != {width} or not np.isfinite(flat).all():
            raise UserError(
                f"{setting}: {FILE} needs rows with vectors of {width} finite numbers, as this model's features "
                "are; write it with the same init_from"
            )
        self._vectors = _unit(flat.reshape(-1, width))
        self._rows = table.drop_columns("vector")

    def __len__(self) -> int:
        return len(self._vectors)

    def nearest(self, feature: np.ndarray, count: int) -> list[Neighbour]:
        """The `count` rows with the largest cosine to a feature [width], nearest first; of equals, earlier ones."""
        cosines = self._vectors @ _unit(feature[None])[0]
        best = np.argsort(-cosines, kind="stable")[:count]
        rows = self._rows.take(best).to_pylist()
        return [Neighbour(**row, cosine=float(cosines[n])) for row, n in zip(rows, best, strict=True)]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
