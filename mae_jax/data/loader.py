"""Batches: the global order, each process's rows of it, reader threads and processes, and bad pictures.

The batch of step s is a pure function of (data.seed, s). Grain runs the readers; what they read is decided by the
place in the global order alone, so that neither threads, processes nor restarts can change it.
"""

import functools
import itertools
import logging
import math
import os
import weakref
from collections.abc import Callable, Iterator

import grain
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.decoding import BadImage
from mae_jax.data.rand_augment import make_augmentation
from mae_jax.data.reading import (
    Augmented,
    CentreCrop,
    InOrder,
    PictureReader,
    PieceReader,
    RandomCrop,
    Shuffled,
    Transform,
    candidates,
    whole,
)
from mae_jax.data.sources import Source
from mae_jax.data.workers import as_user_error, close, first_batch, in_processes
from mae_jax.runtime.errors import UserError, escaped

MAX_PIECE = 64  # pictures that one thread reads before it hands them over
BAD_SHARE = 0.01  # share of bad pictures above which the data are at fault, not a few pictures
BAD_SHARE_SAMPLE = 10_000  # pictures that the share is taken of at the start, when few have been read

_logger = logging.getLogger("mae_jax")


def make_train_batches(
    source: Source,
    data_config: ConfigDict,
    image_size: tuple[int, int],
    channels: int,
    *,
    size_at: Callable[[int], tuple[int, int]] | None = None,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Endless batches of shuffled, cropped and augmented pictures, from step `start_step` on.

    Args:
      size_at: step -> (height, width) of its pictures, where steps differ; None: all have `image_size`.

    Returns:
      Iterator of {"image": uint8 [b, h, w, c], "label": int32 [b], "index": int64 [b]} with b = data.batch_size /
      process_count: rows [process_index * b, (process_index + 1) * b) of the step's global batch, which is the same
      for any number of processes, workers and threads. Every epoch shows each picture once, in a new order; a batch
      may lie across two epochs. Label and index are those of the picture shown, also where it replaces a bad one.
      Call `close()` when done before the end, or the program waits for what is being read ahead.

    Raises:
      UserError: at once, for settings that cannot be; on `next`, for pictures that cannot be used.
    """
    batch_size = data_config.batch_size
    if len(source) < batch_size:
        raise UserError(
            f"data.batch_size={batch_size} is larger than the training data ({len(source)} pictures): "
            f"set data.batch_size to {len(source)} or less"
        )
    if data_config.crop_rule == "centre":
        transform = CentreCrop(data_config.eval_crop)
    else:
        scale, ratio = tuple(data_config.crop_scale), tuple(data_config.crop_ratio)
        transform = RandomCrop(scale, ratio, data_config.seed, data_config.crop_rule)
    augment = make_augmentation(data_config, channels)
    if augment:
        transform = Augmented(transform, augment, data_config.seed)
    return _make_batches(
        source,
        data_config,
        order=Shuffled(len(source), data_config.seed),
        transform=transform,
        size_at=size_at or functools.partial(_same_size, tuple(image_size)),
        channels=channels,
        batch_size=batch_size,
        setting="data.batch_size",
        start_step=start_step,
        num_steps=None,
        keys=("image", "label", "index"),
        process_index=process_index,
        process_count=process_count,
    )


def make_eval_batches(
    source: Source,
    data_config: ConfigDict,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Every picture exactly once, in order, its centre cropped; `batch_size` counts over all processes.

    Returns:
      Iterator of the same batches as `make_train_batches`, and "weight": float32 [b], 1 for a picture and 0 for the
      padding (black, label and index -1) that fills the last batch. All processes get the same number of batches.

    Raises:
      UserError: as `make_train_batches`.
    """
    return _make_batches(
        source,
        data_config,
        order=InOrder(len(source)),
        transform=CentreCrop(data_config.eval_crop),
        size_at=functools.partial(_same_size, tuple(image_size)),
        channels=channels,
        batch_size=batch_size,
        setting="evaluate.batch_size",
        start_step=0,
        num_steps=math.ceil(len(source) / max(batch_size, 1)),
        keys=("image", "label", "index", "weight"),
        process_index=process_index,
        process_count=process_count,
    )


def make_whole_batches(source: Source, data_config: ConfigDict, size: tuple[int, int], channels: int) -> "Batches":
    """Every picture exactly once, in order, as it is; all have this size. Else as `make_eval_batches`."""
    return _make_batches(
        source,
        data_config,
        order=InOrder(len(source)),
        transform=whole,
        size_at=functools.partial(_same_size, size),
        channels=channels,
        batch_size=MAX_PIECE,
        setting="",
        start_step=0,
        num_steps=math.ceil(len(source) / MAX_PIECE),
        keys=("image", "label", "index", "weight"),
        process_index=0,
        process_count=1,
    )


def _make_batches(
    source: Source,
    data_config: ConfigDict,
    *,
    order: Callable[[int], int],
    transform: Transform,
    size_at: Callable[[int], tuple[int, int]],
    channels: int,
    batch_size: int,
    setting: str,
    start_step: int,
    num_steps: int | None,
    keys: tuple[str, ...],
    process_index: int,
    process_count: int,
) -> "Batches":
    """The pipeline that training (`num_steps` None: endless) and evaluation share; `setting` names the batch size."""
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"{setting}={batch_size} must be a positive multiple of the number of processes ({process_count})"
        )
    rows = batch_size // process_count
    piece_size = max(size for size in range(1, min(rows, MAX_PIECE) + 1) if rows % size == 0)
    pieces_per_batch = rows // piece_size
    reader = PictureReader(source, channels, data_config.max_pixels, data_config.on_bad_image, data_config.value_range)
    read_piece = PieceReader(
        reader,
        order,
        transform,
        size_at,
        channels,
        batch_size=batch_size,
        first_row=process_index * rows,
        rows=rows,
        piece_size=piece_size,
        start_step=start_step,
    )

    # Grain needs a length: endless is 2^40 pieces, which leaves room for its 64-bit sums.
    num_pieces = 2**40 if num_steps is None else num_steps * pieces_per_batch
    pieces = grain.MapDataset.range(num_pieces).map(read_piece)
    threads, ahead = _threads_and_buffer(source, data_config, pieces_per_batch)
    dataset = pieces.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if data_config.num_workers > 0:
        dataset = in_processes(dataset, data_config.num_workers)
    # Pieces are joined here and not by the readers: worker processes take turns piece by piece, in order.
    dataset = dataset.batch(pieces_per_batch, drop_remainder=True, batch_fn=_join)
    return Batches(iter(dataset), reader, keys, data_config.num_workers)


def _same_size(size: tuple[int, int], step: int) -> tuple[int, int]:
    return size


def _threads_and_buffer(source: Source, data_config: ConfigDict, pieces_per_batch: int) -> tuple[int, int]:
    """Returns the number of reader threads, and of pieces to read ahead, in each process that reads."""
    readers = max(1, data_config.num_workers)
    ahead = max(1, -(-data_config.prefetch_batches * pieces_per_batch // readers))
    # More threads than cores only contend for Python's lock (two for each core took 1.2 to 1.4 times the time of one);
    # pictures that are in memory need no waiting for, so that one thread does it all.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    useful = 1 if source.in_memory else max(1, cores // readers)
    threads = min(data_config.num_threads, useful)
    return threads, max(ahead, threads)


def _join(pieces: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([piece[key] for piece in pieces]) for key in pieces[0]}


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterator over host batches that keeps account of bad pictures.

    Attributes:
      bad_images: index in the source -> name, of the pictures found bad so far by this process.
    """

    def __init__(self, batches: Iterator, reader: PictureReader, keys: tuple[str, ...], num_workers: int = 0):
        self.bad_images: dict[int, str] = {}
        self._held, self._reader, self._keys, self._num_workers = [batches], reader, keys, num_workers
        self._reads, self._first_reason = 0, ""
        # Also when the program ends: Grain's threads and processes must go before the interpreter's parts do.
        self._finalizer = weakref.finalize(self, close, self._held, num_workers)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._finalizer.alive:  # closed, at its end, or stopped by an error
            raise StopIteration
        try:
            starts = self._num_workers and not self._reads
            batch = first_batch(self._held[0]) if starts else next(self._held[0])
        except Exception as error:
            told = error if isinstance(error, UserError | StopIteration) else as_user_error(error, self._num_workers)
            if told:
                error.__traceback__ = None  # its frames hold what is to be let go
            self.close()
            if told:
                raise told from None
            raise
        self._count(batch)
        return {key: batch[key] for key in self._keys}

    def close(self):
        """Stops the reader threads and processes; can be called twice."""
        self._finalizer()

    def _count(self, batch: dict[str, np.ndarray]):
        total = len(self._reader.source)
        self._reads += int(batch["weight"].sum())
        for row in np.flatnonzero(batch["failed_reads"]):
            # A reader sends only how many candidates failed; which they were follows from the index asked for.
            failed = itertools.islice(candidates(int(batch["asked_index"][row]), total), batch["failed_reads"][row])
            for index in failed:
                if index not in self.bad_images:
                    self._note_bad(index)
        limit = BAD_SHARE * max(min(self._reads, total), min(total, BAD_SHARE_SAMPLE))
        if len(self.bad_images) > limit:
            self.close()
            names = ", ".join(list(self.bad_images.values())[:3])
            raise UserError(
                f"{len(self.bad_images)} of the first {self._reads} pictures read, of {total}, cannot be used: {names}"
                f"{', ...' if len(self.bad_images) > 3 else ''} (the first: {self._first_reason}); up to 1 % are "
                "replaced by others: remove or mend such files (each is named in the log)"
            )

    def _note_bad(self, index: int):
        name = self.bad_images[index] = self._reader.source.name_of(index)
        try:
            self._reader.read(index, patient=False)  # again, for the reason: readers send numbers only
            reason = "it could not be read"
        except BadImage as error:
            reason = str(error)
        self._first_reason = self._first_reason or reason
        _logger.warning("bad picture %s (%s): another takes its place", escaped(name), escaped(reason))
