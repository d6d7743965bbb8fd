"""Reader processes: how they start, hand over what they read and end, and what a system may refuse them."""

import errno
import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import TypeVar

import grain
import numpy as np
from absl import flags

from mae_jax.runtime.allocator import keep_freed_memory
from mae_jax.runtime.errors import UserError, reason

MIN_SHARED = 2**14  # bytes of an array that processes share; a pipe (64 KiB) must hold several of those below
CLOSE_SECONDS = 5  # that readers are given to stop, and one more for each process: a disk may never answer them
DELETE_SECONDS = 0.2  # that Grain is given to delete shared memory, which it does in a thread of its own

T = TypeVar("T")


def in_processes(dataset: grain.IterDataset, num_workers: int) -> grain.IterDataset:
    """The same pieces, in the same order, read by `num_workers` processes."""
    if not flags.FLAGS.is_parsed():  # Grain's processes look at flags of its own, also outside an absl app
        flags.FLAGS.mark_as_parsed()
    options = grain.experimental.DatasetOptions(min_shm_size=MIN_SHARED)
    dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
    processes = grain.MultiprocessingOptions(num_workers=num_workers)
    return dataset.mp_prefetch(processes, worker_init_fn=_start_worker).map(_copy)


def first_batch(batches: Iterator[T]) -> T:
    """The first batch. Processes that read are started in a thread that blocks the signals to stop, as they then do.

    A process that ends while it is started would leave the main process waiting for it for ever (Python 3.11).
    """

    def read():
        try:
            multiprocessing.get_context("spawn").Lock()  # starts Python's resource tracker, which lets signals in again
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
            result.set_result(next(batches))
        except BaseException as error:
            result.set_exception(error)

    result = Future()
    threading.Thread(target=read, daemon=True).start()
    return result.result()


def close(held: list[Iterator], num_workers: int) -> None:
    """Stops what reads, and lets go of it: `held` is emptied. Readers that are stuck in the system are left behind.

    Memory and semaphores that processes share are deleted with the arrays and iterators that hold them, and these hold
    one another: uncollected, they would outlive the program, or Python would complain about them at its end.
    """
    closing = threading.Thread(target=held.pop().close, daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS + num_workers)
    if num_workers:
        gc.collect()
        time.sleep(DELETE_SECONDS)


def as_user_error(error: Exception, num_workers: int) -> UserError | None:
    """What a user can mend of the system's refusals to run reader processes; errors of reading are UserErrors."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    full = full or isinstance(error, RuntimeError) and f"exit code -{signal.SIGBUS.value}." in str(error)
    if not num_workers or not full and not isinstance(error, OSError):
        return None
    remedy = "set data.num_workers=0 to read in threads"
    if full:
        return UserError(
            f"/dev/shm is full, which data.num_workers={num_workers} hands over pictures in: {remedy}, or give the "
            "container more, for example docker run --shm-size=8g"
        )
    return UserError(f"data.num_workers={num_workers} processes cannot be started: {reason(error)}; {remedy}")


def _start_worker(worker_index: int, num_workers: int):
    """Makes a worker process end when the main process was killed, and leaves signals to stop to the main process.

    A terminal sends Ctrl-C, and Slurm and `timeout` SIGTERM, to all processes at once.
    """
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _copy(piece: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Out of the shared memory that a worker process sent it in, of which containers often have little."""
    return {key: np.array(value) for key, value in piece.items()}
