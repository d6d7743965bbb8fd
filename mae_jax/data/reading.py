"""What reader threads and processes do: from places in the global order to small arrays of ready pictures.

Everything here can be pickled, and everything is a function of the place in the order alone.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
from grain.experimental import index_shuffle

from mae_jax.data.decoding import BadImage, open_picture
from mae_jax.data.sources import Source
from mae_jax.data.transforms import Picture, crop_draws, random_resized_crop, resize_and_centre_crop
from mae_jax.data.values import Range
from mae_jax.runtime.errors import UserError, reason
from mae_jax.runtime.retry import with_patience

REPLACEMENT_TRIES = 20  # pictures tried in the place of one that cannot be read
DRAWS_AT_ONCE = 64  # places whose crops are drawn together; 20 KB
RUNS_KEPT = 64  # such runs of places that are remembered: more than threads read at a time

# (picture, place in the order, size) -> uint8 [*size, c]
Transform = Callable[[Picture, int, tuple[int, int]], np.ndarray]


class Shuffled:
    """The order of training: place -> index. Every run of `length` places is one epoch, each in its own order."""

    def __init__(self, length: int, seed: int):
        self._length = length
        self._seed = seed
        self._seed_of_epoch = functools.lru_cache(maxsize=4)(self._hash)

    def __call__(self, place: int) -> int:
        epoch, place_in_epoch = divmod(place, self._length)
        return index_shuffle(place_in_epoch, max_index=self._length - 1, seed=self._seed_of_epoch(epoch), rounds=4)

    def _hash(self, epoch: int) -> int:
        return int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])

    def __reduce__(self):
        return Shuffled, (self._length, self._seed)


class InOrder:
    """The order of evaluation: each index once, then -1, which stands for padding."""

    def __init__(self, length: int):
        self._length = length

    def __call__(self, place: int) -> int:
        return place if place < self._length else -1


class RandomCrop:
    """The transform of training: (picture, place, size) -> a random resized crop; the box is keyed by the place."""

    def __init__(
        self,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        seed: int,
        rule: str = "retry",
    ):
        self._scale, self._ratio, self._seed, self._rule = scale, ratio, seed, rule
        # Many places at once, since most of the time goes into making a generator. Threads read different runs.
        self._draws_of_run = functools.lru_cache(maxsize=RUNS_KEPT)(self._draw_run)

    def __call__(self, picture: Picture, place: int, size: tuple[int, int]) -> np.ndarray:
        run, place_in_run = divmod(place, DRAWS_AT_ONCE)
        draws = self._draws_of_run(run)[place_in_run]
        return random_resized_crop(picture, draws, size, self._scale, self._ratio, self._rule)

    def _draw_run(self, run: int) -> np.ndarray:
        return crop_draws(self._seed, run * DRAWS_AT_ONCE, DRAWS_AT_ONCE)

    def __reduce__(self):
        return RandomCrop, (self._scale, self._ratio, self._seed, self._rule)


class CentreCrop:
    """The transform of evaluation: (picture, place, size) -> its centre."""

    def __init__(self, eval_crop: float):
        self._eval_crop = eval_crop

    def __call__(self, picture: Picture, place: int, size: tuple[int, int]) -> np.ndarray:
        return resize_and_centre_crop(picture, size, self._eval_crop)


def whole(picture: Picture, place: int, size: tuple[int, int]) -> np.ndarray:
    """The transform that does nothing, of pictures that have the size."""
    return picture.whole()


class Augmented:
    """A transform and then an augmentation, (uint8 [h, w, c], generator) -> uint8 [h, w, c], keyed by the place."""

    def __init__(
        self,
        transform: Transform,
        augment: Callable[[np.ndarray, np.random.Generator], np.ndarray],
        seed: int,
    ):
        self._transform, self._augment, self._seed = transform, augment, seed

    def __call__(self, picture: Picture, place: int, size: tuple[int, int]) -> np.ndarray:
        # The third number sets it apart from the crops, whose counters are below 2^128.
        rng = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 1, place]))
        return self._augment(self._transform(picture, place, size), rng)


def candidates(index: int, length: int) -> Iterator[int]:
    """Yields `index`, then the indices to try in its place: a function of `index` and `length` alone."""
    yield index
    rng = np.random.default_rng((index, length))
    for _ in range(REPLACEMENT_TRIES):
        yield int(rng.integers(length))


class PictureReader:
    """Reads, decodes and transforms one picture; puts another in its place if it is bad.

    Args:
      max_pixels, value_range: as `open_picture` has them.
      on_bad_image: "replace" or "raise".
    """

    def __init__(
        self, source: Source, channels: int, max_pixels: int, on_bad_image: str, value_range: Range | None = None
    ):
        self.source = source
        self._channels, self._max_pixels, self._on_bad_image = channels, max_pixels, on_bad_image
        self._value_range = value_range

    def read(
        self, index: int, take: Callable[[Picture], np.ndarray] = lambda picture: picture.whole(), patient: bool = True
    ) -> tuple[np.ndarray, int]:
        """Returns (what is taken of picture `index`, its label), or raises BadImage.

        If `patient`, an error of the disk or the network that may pass is waited for, up to two seconds.
        """
        try:
            record = with_patience(lambda: self.source[index]) if patient else self.source[index]
        except OSError as error:  # the file has gone, may not be read, or lies on a faulty disk
            raise BadImage(reason(error)) from error
        try:
            picture = open_picture(record["image"], self._channels, self._max_pixels, self._value_range)
            return take(picture), record["label"]
        except UserError as error:
            raise UserError(f"{self.source.name_of(index)}: {error}") from error

    def read_or_replace(self, index: int, take: Callable[[Picture], np.ndarray]) -> tuple[np.ndarray, int, int, int]:
        """Returns (what is taken, label, index of the picture read, number of candidates that failed before it)."""
        first = None
        for failed, candidate in enumerate(candidates(index, len(self.source))):
            try:
                image, label = self.read(candidate, take)
                return image, label, candidate, failed
            except BadImage as error:
                if self._on_bad_image == "raise":
                    raise UserError(
                        f"{self.source.name_of(candidate)} cannot be used: {error}; mend or remove it, "
                        "or set data.on_bad_image=replace"
                    ) from error
                first = first or error
        raise UserError(
            f"{self.source.name_of(index)} and the {REPLACEMENT_TRIES} pictures tried in its place cannot be used; "
            f"the first: {first}"
        )


class PieceReader:
    """Reads piece k of this process's share of the batches; a piece is a run of rows that one thread reads.

    Batches are read in pieces so that all threads work on the next batch, and little is held in memory.

    Args:
      reader: of single pictures.
      order: place in the global order -> index in the source, -1 for padding.
      transform: what is done to each picture.
      size_at: step -> (height, width) of its transformed pictures.
      channels: of the pictures.
      batch_size: rows of the global batch.
      first_row, rows: the rows of the global batch that this process reads.
      piece_size: rows of a piece; divides `rows`.
      start_step: the step that piece 0 belongs to.
    """

    def __init__(
        self,
        reader: PictureReader,
        order: Callable[[int], int],
        transform: Transform,
        size_at: Callable[[int], tuple[int, int]],
        channels: int,
        *,
        batch_size: int,
        first_row: int,
        rows: int,
        piece_size: int,
        start_step: int,
    ):
        self._reader, self._order, self._transform = reader, order, transform
        self._size_at, self._channels = size_at, channels
        self._batch_size, self._first_row, self._start_step = batch_size, first_row, start_step
        self._pieces_per_batch, self._piece_size = rows // piece_size, piece_size

    def __call__(self, piece: int) -> dict[str, np.ndarray]:
        """Returns the rows of a piece: image, label, index, weight, and what the loader needs to name bad pictures."""
        step, part = divmod(int(piece), self._pieces_per_batch)
        step += self._start_step
        first = step * self._batch_size + self._first_row + part * self._piece_size
        size, image_size = self._piece_size, self._size_at(step)
        rows = {
            "image": np.zeros((size, *image_size, self._channels), np.uint8),
            "label": np.full(size, -1, np.int32),
            "index": np.full(size, -1, np.int64),
            "weight": np.zeros(size, np.float32),
            "asked_index": np.full(size, -1, np.int64),
            "failed_reads": np.zeros(size, np.int32),
        }
        for row, place in enumerate(range(first, first + size)):
            asked = self._order(place)
            if asked < 0:
                continue
            take = functools.partial(self._transform, place=place, size=image_size)
            rows["image"][row], label, index, failed = self._reader.read_or_replace(asked, take)
            rows["label"][row], rows["index"][row], rows["weight"][row] = label, index, 1
            rows["asked_index"][row], rows["failed_reads"][row] = asked, failed
        return rows
