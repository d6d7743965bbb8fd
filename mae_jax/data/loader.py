"""Batches on the host: each process's rows of the global order, read ahead, and a record of bad pictures.

The batch of step s is a pure function of (data.seed, s): no thread, process or restart can change it.
"""

import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.rand_augment import make_augmentation
from mae_jax.data.reading import Order, PictureReader, PieceReader
from mae_jax.data.sources import Source
from mae_jax.data.transforms import Augmented, CentreCrop, RandomCrop, Transform
from mae_jax.data.workers import call_ahead
from mae_jax.runtime.errors import UserError, escaped

MAX_PIECE = 64  # pictures that a thread reads before handing them over
ENDLESS = 2**40  # pieces
BAD_SHARE = 0.01  # above this share of bad pictures, the data are at fault
BAD_SHARE_SAMPLE = 10_000  # the share refers to at least this many pictures, even if fewer have been read

_logger = logging.getLogger("mae_jax")


class Batches(Iterator[dict[str, np.ndarray]]):
    """Batches of a source. Close them if you stop early, or the program waits for what is read ahead.

    `bad_images` maps indices in the source to names, for the bad pictures that this process has found so far.
    """

    def __init__(
        self,
        source: Source,
        data: ConfigDict,
        channels: int,
        transform: Transform,
        size_at: Callable[[int], tuple[int, int]],
        *,
        batch_size: int,
        setting: str,
        steps: int | None,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`setting` names the batch size in errors; `steps` None: endless and shuffled, else in order, with weights."""
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"{setting}={batch_size} must be a positive multiple of the number of processes ({process_count})"
            )
        self.bad_images: dict[int, str] = {}
        self._source, self._weighted, self._reads, self._first_reason = source, steps is not None, 0, ""
        rows = batch_size // process_count
        piece_size = max(size for size in range(1, min(rows, MAX_PIECE) + 1) if rows % size == 0)
        self._per_batch = rows // piece_size
        reader = PictureReader(source, channels, data.max_pixels, data.on_bad_image, data.value_range)
        order = Order(len(source), data.seed if steps is None else None)
        read_piece = PieceReader(
            reader, order, transform, size_at, batch_size, process_index * rows, piece_size, self._per_batch, start_step
        )
        count = ENDLESS if steps is None else steps * self._per_batch
        workers = data.num_workers
        # More threads than cores only contend for Python's lock (two per core took 1.2 to 1.4 times as long as one).
        # Pictures in memory never wait: one thread is enough.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, min(data.num_threads, 1 if source.in_memory else cores // max(1, workers)))
        ahead = data.prefetch_batches * self._per_batch
        self._pieces = call_ahead(read_piece, count, workers=workers, threads=threads, ahead=ahead)

    def __next__(self) -> dict[str, np.ndarray]:
        pieces = list(itertools.islice(self._pieces, self._per_batch))
        if not pieces:
            raise StopIteration
        batch = {name: np.concatenate([piece[name] for piece in pieces]) for name in ("image", "label", "index")}
        self._reads += np.count_nonzero(batch["index"] >= 0)
        self._note_bad({index: reason for piece in pieces for index, reason in piece["bad"].items()})
        return batch | ({"weight": np.float32(batch["index"] >= 0)} if self._weighted else {})

    def close(self) -> None:
        """Stops reading ahead."""
        self._pieces.close()

    def _note_bad(self, found: dict[int, str]) -> None:
        for index, reason in found.items():
            if index not in self.bad_images:
                name = self.bad_images[index] = self._source.name_of(index)
                self._first_reason = self._first_reason or reason
                _logger.warning("bad picture %s (%s): it is replaced by another", escaped(name), escaped(reason))
        total = len(self._source)
        limit = BAD_SHARE * max(min(self._reads, total), min(total, BAD_SHARE_SAMPLE))
        if len(self.bad_images) > limit:
            self.close()
            names = ", ".join(list(self.bad_images.values())[:3])
            raise UserError(
                f"{len(self.bad_images)} of the first {self._reads} pictures read, of {total}, cannot be used: {names}"
                f"{', ...' if len(self.bad_images) > 3 else ''} (the first: {self._first_reason}); up to 1 % are "
                "replaced by others: remove or fix such files (each is named in the log)"
            )


def make_train_batches(
    source: Source,
    data: ConfigDict,
    image_size: tuple[int, int],
    channels: int,
    *,
    size_at: Callable[[int], tuple[int, int]] | None = None,
    **share: int,
) -> Batches:
    """Endless batches of shuffled, cropped and augmented pictures.

    Every epoch shows each picture once, in a new order; a batch may span two epochs. `size_at` maps a step to the
    (height, width) of its images (None: always `image_size`); `share` is start_step, process_index and process_count.
    Raises UserError: at once for impossible settings, on `next` for unusable pictures.

    Returns:
      {"image": uint8 [b, h, w, c], "label": int32 [b], "index": int64 [b]} with b = data.batch_size / process_count:
      rows [process_index * b, (process_index + 1) * b) of the global batch. Label and index are those of the picture
      shown, even if it replaces a bad one.
    """
    if len(source) < data.batch_size:
        raise UserError(
            f"data.batch_size={data.batch_size} is larger than the training data ({len(source)} pictures): "
            f"set data.batch_size to {len(source)} or less"
        )
    transform: Transform = CentreCrop(data.eval_crop)
    if data.crop_rule != "centre":
        transform = RandomCrop(tuple(data.crop_scale), tuple(data.crop_ratio), data.seed, data.crop_rule)
    if augment := make_augmentation(data, channels):
        transform = Augmented(transform, augment, data.seed)
    size_at = size_at or functools.partial(_same_size, tuple(image_size))
    return Batches(
        source, data, channels, transform, size_at,
        batch_size=data.batch_size, setting="data.batch_size", steps=None, **share,
    )  # fmt: skip


def make_eval_batches(
    source: Source,
    data: ConfigDict,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int,
    *,
    eval_crop: float | None = None,
    **share: int,
) -> Batches:
    """Every picture exactly once, in order, centre-cropped; `batch_size` counts over all processes.

    The batches are those of `make_train_batches`, and "weight": float32 [b], 0 for the padding (black, label and index
    -1) of the last one, else 1. All processes get the same number of batches. `eval_crop` replaces `data.eval_crop`;
    `share` is process_index and process_count.
    """
    transform = CentreCrop(data.eval_crop if eval_crop is None else eval_crop)
    steps = math.ceil(len(source) / max(batch_size, 1))
    return Batches(
        source, data, channels, transform, functools.partial(_same_size, tuple(image_size)),
        batch_size=batch_size, setting="evaluate.batch_size", steps=steps, **share,
    )  # fmt: skip


def _same_size(size: tuple[int, int], step: int) -> tuple[int, int]:
    return size
