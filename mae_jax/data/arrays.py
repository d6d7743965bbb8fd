"""Batches of arrays in memory, such as the features of a frozen encoder."""

from collections.abc import Iterator, Mapping

import numpy as np

from mae_jax.data.reading import Order


class ArrayBatches(Iterator[dict[str, np.ndarray]]):
    """Endless batches of this process's rows of arrays [N, ...], in the order of `make_train_batches`."""

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
        self.bad_images: dict[int, str] = {}
        self._arrays, self._batch_size, self._step = arrays, batch_size, start_step
        self._own = own_rows(batch_size, process_index, process_count)
        self._order = Order(len(next(iter(arrays.values()))), seed)

    def __next__(self) -> dict[str, np.ndarray]:
        places = range(self._step * self._batch_size, (self._step + 1) * self._batch_size)[self._own]
        self._step += 1
        rows = np.fromiter(map(self._order, places), np.int64)
        return {name: array[rows] for name, array in self._arrays.items()}

    def close(self) -> None:
        """Nothing is held open."""


def eval_array_batches(
    arrays: Mapping[str, np.ndarray], batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every row once, in order, and "weight" float32 [b], 0 for the last batch's padding: one process's share."""
    own = own_rows(batch_size, process_index, process_count)
    total = len(next(iter(arrays.values())))
    for first in range(0, total, batch_size):
        padding = max(0, first + batch_size - total)
        batch = {name: array[first : first + batch_size] for name, array in arrays.items()}
        batch |= {"weight": np.ones(batch_size - padding, np.float32)}
        yield {name: np.pad(rows, [(0, padding)] + [(0, 0)] * (rows.ndim - 1))[own] for name, rows in batch.items()}


def own_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """One process's rows of a global batch."""
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)
