"""The processes of a run: one, or one for each host of a pod. Only process 0 writes.

`jax.distributed` connects them, and ends all if one sends no heartbeats, but does not say why. So every message between
processes can also carry a failure (`_exchange`): during preparation, all exit with the failed one's code and reason.
"""

import contextlib
import functools
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mae_jax.runtime.cluster import find_place, may_be_tpu_pod, meet
from mae_jax.runtime.errors import UserError, complain, first_line

START_SECONDS = 300  # for all processes to connect: hosts do not start at the same time
HEARTBEAT_SECONDS = 20  # without a heartbeat, after which JAX considers a process lost
TOLD_SECONDS = 20  # for all processes to learn of a failure
LAST_SECONDS = 2  # process 0 ends this much later, since JAX then aborts all processes
PADDING = 4096  # bytes; each new size compiles a program


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None, *, saves=False) -> None:
    """Connects the run's processes, if there are several; call it before anything asks JAX for a device.

    Discards standard output except in process 0. UserError for bad arguments, or if the processes cannot connect.

    Args:
      coordinator, count, index: see `find_place`.
      saves: whether all processes save when one of them gets SIGTERM (`SharedStopSignal`).
    """
    place = find_place(coordinator, count, index, os.environ) or {}
    if not place and (coordinator or not may_be_tpu_pod(os.environ, jax.config.jax_platforms)):
        return
    jax.config.update("jax_enable_preemption_service", saves)
    where = f"{coordinator or 'found by JAX'}, process {place.get('process_id', '?')}"
    timer = threading.Timer(START_SECONDS, _give_up, (where,))  # JAX would end with a stack trace
    timer.start()
    try:
        if coordinator:
            place["coordinator_address"] = meet(coordinator, count, index)
        jax.distributed.initialize(
            **place, initialization_timeout=2 * START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except UserError:
        raise
    except (RuntimeError, ValueError) as error:
        if not place:
            return  # not a pod
        raise UserError(
            f"the processes cannot find one another ({where}): {first_line(error)}; name a free port of process 0's "
            "host by JAX_COORDINATOR_ADDRESS=HOST:PORT (mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT)"
        ) from error
    finally:
        timer.cancel()
    if place["process_id"] if place else jax.process_index():
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # not sys.stdout alone: Gloo writes there too


def _give_up(where: str) -> NoReturn:
    complain(
        f"error: the processes did not find one another within {START_SECONDS} s ({where}): are all of them started, "
        "and can each host reach that of process 0?"
    )
    os._exit(2)


def process_count() -> int:
    """Number of processes. Asks JAX only if there are several: it would take the devices."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, which alone writes metrics, pictures and results."""
    return process_count() == 1 or jax.process_index() == 0


def only_main(function: Callable[..., None]) -> Callable[..., None]:
    """A decorator: the function runs in process 0 only."""

    @functools.wraps(function)
    def wrapped(*arguments, **named):
        if is_main():
            function(*arguments, **named)

    return wrapped


def from_main(value: Any) -> Any:
    """Process 0's value, which JSON must be able to hold, in all processes. All must call it."""
    return value if process_count() == 1 else json.loads(_exchange(json.dumps(value) if is_main() else "")[0])


def sum_of_all(number: int) -> int:
    """The sum over all processes, in each of them. All must call it."""
    return number if process_count() == 1 else sum(map(int, _exchange(str(number))))


def wait_for_all() -> None:
    """Returns when every process has called it."""
    if process_count() > 1:
        _exchange("")


def _exchange(text: str, code: int = 0) -> list[str]:
    """The texts of all processes. If one gives an exit code, all end with it, and its text is the reason."""
    own = np.frombuffer(text.encode(), np.uint8)
    facts = multihost_utils.process_allgather(np.array([code, len(own)], np.int32))
    padded = np.zeros(-(-facts[:, 1].max() // PADDING) * PADDING, np.uint8)
    padded[: len(own)] = own
    gathered = multihost_utils.process_allgather(padded)
    texts = [bytes(row[:size]).decode() for row, (_, size) in zip(gathered, facts, strict=True)]
    if not code and facts[:, 0].any():
        culprit = int(facts[:, 0].argmax())
        complain(f"error: process {culprit} failed: {texts[culprit]}")
        end(int(facts[culprit, 0]))
    return texts


def finish() -> None:
    """Returns when all processes have finished their work."""
    jax.distributed.shutdown()


def fail(error: BaseException | str, code: int, *, unexpected: bool = False) -> NoReturn:
    """Ends all processes with a one-line error, or with the traceback of an unexpected error."""
    several, why = process_count() > 1, str(error)
    if several and (lost := re.search(r"(Gloo|NCCL|UNAVAILABLE)[^;\n]*", why)):  # a collective operation failed
        complain(f"error: another process was lost: it failed, was killed, or its host has gone ({lost[0]})")
        end(1)
    if unexpected:
        traceback.print_exception(error)
        why = f"{type(error).__name__}: {first_line(error)}"
    else:
        complain(f"error: {why}")
    if several:
        # Processes that are training reach no exchange; they end once this process has ended.
        threading.Timer(TOLD_SECONDS, end, (code,)).start()
        with contextlib.suppress(RuntimeError, ValueError):
            _exchange(why, code)
        end(code)
    sys.exit(code)


def end(code: int) -> NoReturn:
    """Ends this process at once, even if threads wait for a disk that does not answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process_count() > 1 and is_main():
        time.sleep(LAST_SECONDS)
    os._exit(code)
