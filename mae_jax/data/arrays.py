"""Batches of arrays that are in memory, in the order that pictures have in training."""

from collections.abc import Iterator, Mapping

import numpy as np

from mae_jax.data.reading import Shuffled


class ArrayBatches(Iterator[dict[str, np.ndarray]]):
    """Endless batches of the rows of arrays [N, ...]; the order is that of `make_train_batches` with the same seed.

    Every process has all arrays; each gets its rows of the batch, as `make_train_batches` has it.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        batch_size: int,
        *,
        seed: int,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self.bad_images: dict[int, str] = {}  # as Batches has it
        self._arrays, self._batch_size, self._step = arrays, batch_size, start_step
        self._own = own_rows(batch_size, process_index, process_count)
        self._order = Shuffled(len(next(iter(arrays.values()))), seed)

    def __next__(self) -> dict[str, np.ndarray]:
        first = self._step * self._batch_size
        self._step += 1
        places = range(first, first + self._batch_size)[self._own]
        rows = np.fromiter((self._order(place) for place in places), np.int64)
        return {name: array[rows] for name, array in self._arrays.items()}

    def close(self) -> None:
        """Nothing is held open."""


def eval_array_batches(
    arrays: Mapping[str, np.ndarray], batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order, with "weight" float32 [b]: 0 for the zero rows that fill the last batch.

    Each process gets its rows of each batch, as `make_eval_batches` has it.
    """
    own = own_rows(batch_size, process_index, process_count)
    total = len(next(iter(arrays.values())))
    for first in range(0, total, batch_size):
        real = min(batch_size, total - first)
        batch = {name: array[first : first + real] for name, array in arrays.items()}
        padding = batch_size - real
        batch = {name: np.pad(rows, [(0, padding)] + [(0, 0)] * (rows.ndim - 1)) for name, rows in batch.items()}
        batch |= {"weight": np.repeat(np.float32([1, 0]), [real, padding])}
        yield {name: rows[own] for name, rows in batch.items()}


def own_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of a global batch that one process has."""
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)
