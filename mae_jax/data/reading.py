"""Reads pictures: the order of a run, one picture or its replacement, and pieces of batches.

Everything here depends on the place in the order alone, and can be pickled for reader processes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from mae_jax.data.decoding import BadImage, open_picture
from mae_jax.data.sources import Source
from mae_jax.data.transforms import Picture, Transform
from mae_jax.data.values import Range
from mae_jax.runtime.errors import UserError, reason, with_patience

REPLACEMENT_TRIES = 20  # pictures tried in place of a bad one


@dataclasses.dataclass(frozen=True)
class Order:
    """The global order, place -> index: with a seed, shuffled in each epoch; else each once, then -1 (padding)."""

    length: int
    seed: int | None = None

    def __call__(self, place: int) -> int:
        if self.seed is None:
            return place if place < self.length else -1
        epoch, place_in_epoch = divmod(place, self.length)
        return index_shuffle(place_in_epoch, max_index=self.length - 1, seed=_epoch_seed(self.seed, epoch), rounds=4)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def candidates(index: int, length: int) -> Iterator[int]:
    """Yields `index`, then the indices to try in its place."""
    yield index
    rng = np.random.default_rng((index, length))
    for _ in range(REPLACEMENT_TRIES):
        yield int(rng.integers(length))


@dataclasses.dataclass(frozen=True)
class PictureReader:
    """Reads and transforms a picture or its replacement; see `open_picture` for the settings."""

    source: Source
    channels: int
    max_pixels: int
    on_bad_image: str  # replace | raise
    value_range: Range | None = None

    def read(self, index: int, take: Callable[[Picture], np.ndarray]) -> tuple[np.ndarray, int]:
        """(take(picture), its label). Raises BadImage; on a failing disk, only after two seconds of retries."""
        try:
            record = with_patience(lambda: self.source[index])
        except OSError as error:  # the file is gone, unreadable, or on a faulty disk
            raise BadImage(reason(error)) from error
        try:
            picture = open_picture(record["image"], self.channels, self.max_pixels, self.value_range)
            return take(picture), record["label"]
        except UserError as error:
            raise UserError(f"{self.source.name_of(index)}: {error}") from error

    def read_or_replace(
        self, index: int, take: Callable[[Picture], np.ndarray]
    ) -> tuple[np.ndarray, int, int, dict[int, str]]:
        """(take(picture), label, index of the picture read, {index: reason} of bad ones before it)."""
        bad: dict[int, str] = {}
        for candidate in candidates(index, len(self.source)):
            try:
                return *self.read(candidate, take), candidate, bad
            except BadImage as error:
                if self.on_bad_image == "raise":
                    raise UserError(
                        f"{self.source.name_of(candidate)} cannot be used: {error}; fix or remove it, "
                        "or set data.on_bad_image=replace"
                    ) from error
                bad[candidate] = str(error)
        raise UserError(
            f"{self.source.name_of(index)} and the {REPLACEMENT_TRIES} pictures tried in its place cannot be used; "
            f"the first: {bad[index]}"
        )


@dataclasses.dataclass(frozen=True)
class PieceReader:
    """Reads piece k of this process's rows. One thread reads a piece, so all threads work on the next batch."""

    reader: PictureReader
    order: Order
    transform: Transform
    size_at: Callable[[int], tuple[int, int]]  # step -> (height, width)
    batch_size: int  # over all processes
    first_row: int  # this process's first row of the global batch
    piece_size: int
    pieces_per_batch: int
    start_step: int

    def __call__(self, piece: int) -> dict[str, Any]:
        """The rows "image", "label" and "index", and "bad": {index: reason} of bad pictures."""
        step, part = divmod(piece, self.pieces_per_batch)
        step += self.start_step
        first = step * self.batch_size + self.first_row + part * self.piece_size
        rows, image_size = self.piece_size, self.size_at(step)
        images = np.zeros((rows, *image_size, self.reader.channels), np.uint8)
        labels, indices, all_bad = np.full(rows, -1, np.int32), np.full(rows, -1, np.int64), {}
        for row, place in enumerate(range(first, first + rows)):
            if (asked := self.order(place)) >= 0:
                take = functools.partial(self.transform, place=place, size=image_size)
                images[row], labels[row], indices[row], bad = self.reader.read_or_replace(asked, take)
                all_bad |= bad
        return {"image": images, "label": labels, "index": indices, "bad": all_bad}
