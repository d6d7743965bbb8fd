"""Calling a function ahead of time, in order, by threads of this process or by processes of their own."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from mae_jax.runtime.errors import UserError, reason
from mae_jax.runtime.platform import keep_freed_memory

T = TypeVar("T")
_STOPS = (signal.SIGINT, signal.SIGTERM)
_in_process: dict[str, Any] = {}  # of a worker process: its function and its threads


def call_ahead(fn: Callable[[int], T], count: int, *, workers: int, threads: int, ahead: int) -> Iterator[T]:
    """Yields fn(0), ..., fn(count - 1), each called before it is asked for.

    When the iterator is closed, calls that have begun go on, but nothing waits for them before the program ends.

    Args:
      fn: can be pickled, if there are `workers`.
      workers: processes that call `fn`; 0: threads of this process do.
      threads: in each process.
      ahead: calls that may have been made, or be in progress, in all.

    Raises:
      UserError: the system refuses the processes, or one of them has been killed.
    """
    if not workers:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        return _in_order(pool, pool.submit, fn, range(count), max(ahead, threads))
    # A process takes as many numbers at once as it has threads.
    runs = (range(first, min(first + threads, count)) for first in range(0, count, threads))
    return _from_processes(fn, runs, workers, threads, max(-(-ahead // threads), workers))


def _from_processes(fn: Callable, runs: Iterable[range], workers: int, threads: int, ahead: int) -> Iterator:
    remedy = "set data.num_workers=0 to read in threads"

    def submit(fn: Callable, *arguments: Any) -> Future:
        # The first call starts the processes. They inherit that signals to stop are blocked: a terminal, Slurm and
        # `timeout` send these to all processes, but a run that stops still needs its data to come to a good place.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            return pool.submit(fn, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(fn, threads)
        )
        for results in _in_order(pool, submit, _call_run, runs, ahead):
            yield from results
    except BrokenProcessPool as error:
        raise UserError(
            f"data.num_workers={workers}: a reader process has died, perhaps for lack of memory; use fewer, or {remedy}"
        ) from error
    except OSError as error:  # those of reading pictures never come here
        raise UserError(f"data.num_workers={workers} processes cannot be started: {reason(error)}; {remedy}") from error


def _in_order(pool: Executor, submit: Callable, fn: Callable, items: Iterable, ahead: int) -> Iterator:
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(submit(fn, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker(fn: Callable[[int], Any], threads: int) -> None:
    keep_freed_memory()
    _in_process.update(fn=fn, pool=ThreadPoolExecutor(threads))

    def end_with_parent():  # also when that is killed
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _call_run(run: range) -> list:
    return list(_in_process["pool"].map(_in_process["fn"], run))
