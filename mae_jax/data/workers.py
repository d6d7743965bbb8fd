"""Calls a function ahead of time and in order, in threads of this process or in processes of their own."""

import collections
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from mae_jax.runtime.errors import UserError, reason
from mae_jax.runtime.platform import keep_freed_memory

_in_process: dict[str, Any] = {}  # in a worker process: its function and threads


def call_ahead(fn: Callable[[int], Any], count: int, *, workers: int, threads: int, ahead: int) -> Iterator:
    """Yields fn(0), ..., fn(count - 1), with up to `ahead` calls made or in progress ahead of time.

    `workers` processes (0: this one) call the picklable `fn`, each with `threads` threads. Nothing waits for calls that
    still run when the iterator is closed. Raises UserError if processes are refused or killed.
    """
    if not workers:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        return _in_order(pool, pool.submit, fn, range(count), max(ahead, threads))
    # A process takes as many numbers at once as it has threads.
    runs = (range(first, min(first + threads, count)) for first in range(0, count, threads))
    return _from_processes(fn, runs, workers, threads, max(-(-ahead // threads), workers))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _from_processes(fn: Callable, runs: Iterable[range], workers: int, threads: int, ahead: int) -> Iterator:
    def submit(fn: Callable, *arguments: Any) -> Future:
        # The first call starts the processes, which inherit the blocked stop signals. A terminal, Slurm and `timeout`
        # send these to all processes, but a run that stops still needs data until it reaches a safe point.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            return pool.submit(fn, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(fn, threads))
        for results in _in_order(pool, submit, _call_run, runs, ahead):
            yield from results
    except (BrokenProcessPool, OSError) as error:  # errors from reading pictures never get here
        raise UserError(
            f"data.num_workers={workers}: a reader process has died or cannot be started, perhaps for lack of memory "
            f"({reason(error)}); use fewer, or set data.num_workers=0 to read in threads"
        ) from error


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
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # kornia-rs would use a thread per core in each process
    _in_process.update(fn=fn, pool=ThreadPoolExecutor(threads))

    def end_with_parent():  # even if the parent is killed
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _call_run(run: range) -> list:
    return list(_in_process["pool"].map(_in_process["fn"], run))
