"""Batches on the host: each process's rows of the global order, read ahead, and a record of bad pictures.

The batch of step s is a pure function of (data.seed, s): no thread, process or restart can change it.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from grain.experimental import index_shuffle
from ml_collections import ConfigDict

from mae_jax.data.decoding import BadImage, open_picture
from mae_jax.data.files import first_few
from mae_jax.data.rand_augment import make_augmentation
from mae_jax.data.sources import Source, no_labels
from mae_jax.data.transforms import Picture, Size, Transform, augmented, centre_crop, random_crop
from mae_jax.data.workers import call_ahead, usable_cores
from mae_jax.runtime.errors import UserError, escaped, reason, with_patience

REPLACEMENT_TRIES = 20  # pictures tried in place of a bad one
MAX_PIECE = 64  # pictures that a thread reads before handing them over
ENDLESS = 2**40  # pieces
BAD_SHARE = 0.01  # above this share of bad pictures, the data are at fault
BAD_SHARE_SAMPLE = 10_000  # the share refers to at least this many pictures, even if fewer have been read

Arrays = dict[str, np.ndarray]
Share = tuple[int, int]  # (i, n): the rows of process i of n
SizeAt = Callable[[int], Size]  # step -> (height, width) of its images
Sizes = Size | SizeAt

_logger = logging.getLogger("mae_jax")


def index_at(place: int, length: int, seed: int | None) -> int:
    """The global order: with a seed, shuffled in each epoch; else each index once, then -1 (padding)."""
    if seed is None:
        return place if place < length else -1
    epoch, place_in_epoch = divmod(place, length)
    return index_shuffle(place_in_epoch, max_index=length - 1, seed=_epoch_seed(seed, epoch), rounds=4)


@functools.lru_cache(maxsize=16)
def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def places_of(step: int, batch_size: int, share: Share = (0, 1)) -> range:
    """The places of a step, or the share (i, n) of the process i of n."""
    rows = batch_size // share[1]
    first = step * batch_size + share[0] * rows
    return range(first, first + rows)


def array_batches(
    arrays: Arrays, batch_size: int, share: Share = (0, 1), seed: int | None = None, start_step: int = 0
) -> Iterator[Arrays]:
    """Batches of arrays [N, ...] in memory: with a seed endless, in the order of `make_train_batches`.

    Else every row once, in order, and "weight" float32 [b], 0 for the last batch's padding.
    """
    total = len(next(iter(arrays.values())))
    for step in range(-(-total // batch_size)) if seed is None else itertools.count(start_step):
        rows = np.fromiter((index_at(place, total, seed) for place in places_of(step, batch_size, share)), np.int64)
        batch = {name: array[rows] for name, array in arrays.items()}
        if seed is None:
            for values in batch.values():
                values[rows < 0] = 0
            batch["weight"] = np.float32(rows >= 0)
        yield batch


@dataclasses.dataclass(frozen=True)
class PictureReader:
    """Reads a picture or its replacement, as the settings `data.*` say."""

    source: Source
    data: ConfigDict
    channels: int
    replaces: bool = True  # whether a bad picture's row shows another picture; else it stays black

    def read(self, index: int, take: Callable[[Picture], np.ndarray]) -> tuple[np.ndarray, int]:
        """(take(picture), its label). Raises BadImage; on a failing disk, only after two seconds of retries."""
        try:
            record = with_patience(lambda: self.source[index])
        except OSError as error:  # the file is gone, unreadable, or on a faulty disk
            raise BadImage(reason(error)) from error
        try:
            return take(self.open(record["image"])), record["label"]
        except UserError as error:
            raise UserError(f"{self.source.name_of(index)}: {error}") from error

    def open(self, image: bytes | np.ndarray) -> Picture:
        data = self.data
        return open_picture(image, self.channels, data.max_pixels, data.get("dtype") or np.uint8, data.get("bands"))

    def read_or_replace(
        self, index: int, take: Callable[[Picture], np.ndarray]
    ) -> tuple[np.ndarray, int, int, dict[int, str]]:
        """(take(picture), label, index of the picture read, {index: reason} of bad ones before it).

        Without replacement, a bad picture's own index, and None for what it lacks.
        """
        bad: dict[int, str] = {}
        candidate, rng = index, None
        for _ in range(1 + REPLACEMENT_TRIES):
            try:
                return *self.read(candidate, take), candidate, bad
            except BadImage as error:
                if self.data.on_bad_image == "raise":
                    raise UserError(
                        f"{self.source.name_of(candidate)} cannot be used: {error}; fix or remove it, "
                        "or set data.on_bad_image=replace"
                    ) from error
                bad[candidate] = str(error)
                if not self.replaces:
                    return None, None, candidate, bad
            rng = rng or np.random.default_rng((index, len(self.source)))
            candidate = int(rng.integers(len(self.source)))
        raise UserError(
            f"{self.source.name_of(index)} and the {REPLACEMENT_TRIES} pictures tried in its place cannot be used; "
            f"the first: {bad[index]}"
        )

    def read_piece(
        self,
        seed: int | None,
        transform: Transform,
        image_size: Sizes,
        places_of: Callable[[int], range],
        pieces_per_batch: int,
        start_step: int,
        piece: int,
    ) -> dict[str, Any]:
        """The rows "image", "label" and "index" of a part of a batch; "bad": {index: reason}. Each is one thread's."""
        step, part = divmod(piece, pieces_per_batch)
        step += start_step
        size = image_size(step) if callable(image_size) else image_size
        places = places_of(step)
        rows = len(places) // pieces_per_batch
        images = np.zeros((rows, *size, self.channels), self.data.get("dtype") or np.uint8)
        labels, indices, all_bad = no_labels(self.source, rows), np.full(rows, -1, np.int64), {}
        labels = labels.astype(np.int32) if labels.dtype.kind == "i" else labels
        for row, place in enumerate(places[part * rows : (part + 1) * rows]):
            if (asked := index_at(place, len(self.source), seed)) >= 0:
                take = functools.partial(transform, place=place, size=size)
                image, label, indices[row], bad = self.read_or_replace(asked, take)
                if image is not None:
                    images[row], labels[row] = image, label
                all_bad |= bad
        return {"image": images, "label": labels, "index": indices, "bad": all_bad}


class Batches(Iterator[Arrays]):
    """Batches of a source. Close them if you stop early, or the program waits for what is read ahead.

    `bad_images`: index in the source -> name, for the bad pictures that this process has found so far; `reasons`: why.
    """

    def __init__(
        self,
        reader: PictureReader,
        transform: Transform,
        image_size: Sizes,
        batch_size: int,
        steps: int | None,
        share: Share,
        start_step: int = 0,
    ):
        """`steps` None: endless and shuffled, for training; else in order, with weights, for evaluation."""
        if batch_size < 1 or batch_size % share[1]:
            setting = "data.batch_size" if steps is None else "evaluate.batch_size"
            raise UserError(
                f"{setting}={batch_size} must be a positive multiple of the number of processes ({share[1]})"
            )
        source, data = reader.source, reader.data
        self.bad_images: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self._replaces = reader.replaces
        self._source, self._weighted, self._reads = source, steps is not None, 0
        rows = batch_size // share[1]
        self._per_batch = rows // max(size for size in range(1, min(rows, MAX_PIECE) + 1) if rows % size == 0)
        places = functools.partial(places_of, batch_size=batch_size, share=share)
        seed = data.seed if steps is None else None
        order = seed, transform, image_size, places, self._per_batch, start_step
        read_piece = functools.partial(reader.read_piece, *order)
        count = ENDLESS if steps is None else steps * self._per_batch
        # More threads than cores only contend for Python's lock (two per core took 1.2 to 1.4 times as long as one).
        # Pictures in memory never wait: one thread is enough.
        share = usable_cores() // max(1, data.num_workers)
        threads = max(1, min(data.num_threads, 1 if source.in_memory else share))
        ahead = data.prefetch_batches * self._per_batch
        self._pieces = call_ahead(read_piece, count, workers=data.num_workers, threads=threads, ahead=ahead)

    def __next__(self) -> Arrays:
        pieces = list(itertools.islice(self._pieces, self._per_batch))
        if not pieces:
            raise StopIteration
        batch = {name: np.concatenate([piece[name] for piece in pieces]) for name in ("image", "label", "index")}
        self._reads += np.count_nonzero(batch["index"] >= 0)
        for index, why in itertools.chain.from_iterable(piece["bad"].items() for piece in pieces):
            if index not in self.bad_images:
                name = self.bad_images[index] = self._source.name_of(index)
                self.reasons[index] = why
                becomes = "it is replaced by another" if self._replaces else "it is left out"
                _logger.warning("bad picture %s (%s): %s", escaped(name), escaped(why), becomes)
        total, bad = len(self._source), list(self.bad_images.values())
        if self._replaces and too_many_bad(len(bad), self._reads, total):
            self.close()
            raise UserError(
                f"{len(bad)} of the first {self._reads} pictures read, of {total}, cannot be used: {first_few(bad)} "
                f"(the last: {why}); up to 1 % are replaced by others: remove or fix such files"
            )
        if not self._weighted:
            return batch
        shown = batch["index"] >= 0
        if not self._replaces:
            shown &= ~np.isin(batch["index"], list(self.reasons))
        return batch | {"weight": np.float32(shown)}

    def close(self) -> None:
        self._pieces.close()


def too_many_bad(bad: int, reads: int, total: int) -> bool:
    """Whether so many bad pictures, of those read, are a fault of the data."""
    return bad > BAD_SHARE * max(min(reads, total), min(total, BAD_SHARE_SAMPLE))


def make_train_batches(
    source: Source, data: ConfigDict, image_size: Sizes, channels: int, start_step: int = 0, share: Share = (0, 1)
) -> Batches:
    """Endless batches of shuffled, cropped and augmented pictures.

    Returns {"image": [b, h, w, c] of data.dtype, "label": int32 [b] or float32 [b, k] (see `Source.labels`), "index":
    int64 [b]} with b = data.batch_size / n for the `share` (i, n). Label and index are those of the picture shown, even
    if it replaces a bad one. Every epoch shows each picture once, in a new order; a batch may span two. Raises
    UserError, on `next` for unusable pictures.
    """
    if len(source) < data.batch_size:
        raise UserError(
            f"data.batch_size={data.batch_size} is larger than the training data ({len(source)} pictures): "
            f"set data.batch_size to {len(source)} or less"
        )
    transform: Transform = functools.partial(centre_crop, eval_crop=data.eval_crop)
    if data.crop_rule != "centre":
        rules = dict(scale=tuple(data.crop_scale), ratio=tuple(data.crop_ratio), rule=data.crop_rule)
        transform = functools.partial(random_crop, seed=data.seed, **rules)
    if augment := make_augmentation(data, channels):
        transform = functools.partial(augmented, transform=transform, augment=augment, seed=data.seed)
    reader = PictureReader(source, data, channels)
    return Batches(reader, transform, image_size, data.batch_size, None, share, start_step)


def make_eval_batches(
    source: Source,
    data: ConfigDict,
    batch_size: int,
    image_size: Size,
    channels: int,
    share: Share = (0, 1),
    *,
    replaces: bool = True,
) -> Batches:
    """Every picture exactly once, in order, centre-cropped; `batch_size` counts over all processes.

    The batches are those of `make_train_batches`, and "weight": float32 [b], 0 for the padding (black, label and index
    -1) of the last one, else 1. All processes get the same number of batches. Without `replaces`, any number of bad
    pictures are rows of weight 0 with their index and no label.
    """
    transform = functools.partial(centre_crop, eval_crop=data.eval_crop)
    reader, steps = PictureReader(source, data, channels, replaces), -(-len(source) // max(batch_size, 1))
    return Batches(reader, transform, image_size, batch_size, steps, share)
