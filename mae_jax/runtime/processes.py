"""The processes of a run: one, or one for each host of a pod. Process 0 is the one that writes."""

import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mae_jax.runtime.cluster import may_be_tpu_pod, place_from_environment, place_from_flags
from mae_jax.runtime.errors import UserError, complain, first_line
from mae_jax.runtime.lifeline import Lifeline

START_SECONDS = 300  # that processes wait for one another at the start: hosts do not all come up at once
HEARTBEAT_SECONDS = 100  # after which JAX ends all processes because one is there but does nothing any more
SHUTDOWN_SECONDS = 60
OTHERS_FIRST_SECONDS = 2  # in which an error that comes of another process's end is known as such

_lifeline: Lifeline | None = None


def start(
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    *,
    timeout: int = START_SECONDS,
) -> None:
    """Joins the other processes of the run, if there are any; must come before anything asks JAX for a device.

    They are found by itself on Cloud TPU, and where Slurm or Open MPI started them; elsewhere the arguments say
    (`place_from_flags`). Standard output of all but process 0 is thrown away.

    Raises:
      UserError: for arguments that cannot be, or if the others are not there within `timeout` seconds.
    """
    place = place_from_flags(coordinator, count, index) or place_from_environment(os.environ)
    if place is not None and place.count > 1:
        host, port = place.coordinator.rsplit(":", 1)
        _connect(place.count, place.index, host.strip("[]"), int(port), timeout, 0 if place.index else _free_port())
        service_port = _lifeline.service_port
        _initialize(
            timeout, f"{place.coordinator}, process {place.index} of {place.count}",
            coordinator_address=f"{host}:{service_port}", coordinator_bind_address=f"[::]:{service_port}",
            num_processes=place.count, process_id=place.index, local_device_ids=place.local_devices,
            cluster_detection_method="deactivate",
        )  # fmt: skip
    elif place is None and may_be_tpu_pod(os.environ, jax.config.jax_platforms):
        try:
            _initialize(timeout, "TPU")
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
        if jax.distributed.is_initialized():
            _connect_tpu_hosts(timeout)


def refuse_several(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Raises UserError if this is one of several processes of a run, for a task that is not made for them."""
    given = place_from_flags(coordinator, count, index)
    if given is not None or place_from_environment(os.environ) is not None:
        raise UserError(
            "an ablation is one process, which starts a process for each of its runs; to share the runs among hosts "
            "start it once on each, with --config.shard=0/N to N-1/N"
        )


def _initialize(timeout: int, place: str, **settings) -> None:
    # The service would catch SIGTERM itself, for an agreement of its own; here training.signals does.
    with contextlib.suppress(AttributeError):  # a jax without that setting
        jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(timeout, _give_up, (place, timeout))
    timer.start()
    try:
        jax.distributed.initialize(
            **settings, initialization_timeout=2 * timeout,  # after which JAX would end the process with a dump of C++
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"the processes cannot find one another ({place}): {first_line(error)}") from error
    finally:
        timer.cancel()


def _give_up(place: str, timeout: int) -> NoReturn:
    try:
        fail(
            f"the processes did not find one another within {timeout} s ({place}): are all of them started, and can "
            "each host reach that of process 0?",
            2,
        )
    finally:
        os._exit(2)  # SystemExit would end the timer's thread alone


def _connect(count: int, index: int, host: str, port: int, timeout: int, service_port: int = 0) -> None:
    """Ties this process to the others, so that none waits for one that is gone."""
    global _lifeline
    _lifeline = Lifeline(count, index, host, port, timeout, service_port)
    if index > 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # not sys.stdout alone: Gloo writes there too


def _connect_tpu_hosts(timeout: int) -> None:
    # There is no public way to the store of keys and values that the processes share.
    from jax._src.distributed import global_state as shared

    count, index = shared.num_processes, shared.process_id
    host, key = shared.coordinator_address.rsplit(":", 1)[0].strip("[]"), "mae_jax/lifeline"
    if count == 1:
        return
    port = 0 if index == 0 else int(shared.client.blocking_key_value_get(key, 1000 * timeout))
    _connect(count, index, host, port, timeout)
    if index == 0:
        shared.client.key_value_set(key, str(_lifeline.port))


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def process_count() -> int:
    """How many processes the run has. Where it is one, JAX is not asked, which would take the devices for that."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, the only one that writes metrics, pictures and results."""
    return process_count() == 1 or jax.process_index() == 0


def only_main(function: Callable[..., None]) -> Callable[..., None]:
    """Makes a function that writes do nothing in the other processes."""

    @functools.wraps(function)
    def wrapped(*arguments, **named):
        if is_main():
            function(*arguments, **named)

    return wrapped


def from_main(value: Any) -> Any:
    """The value that process 0 gives, in all processes; anything that JSON can hold. All must call it."""
    if process_count() == 1:
        return value
    text = json.dumps(value).encode() if is_main() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = np.frombuffer(text or bytes(size), np.uint8)  # of one length in all of them
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(text)))


def sum_of_all(number: int) -> int:
    """The sum of what each process gives, in all processes. All must call it."""
    return int(np.sum(multihost_utils.process_allgather(np.int32(number))))


def wait_for_all(place: str) -> None:
    """Returns when every process has come to this place."""
    if process_count() > 1:
        multihost_utils.sync_global_devices(place)


def finish() -> None:
    """Returns when all processes have come to the end of their work."""
    if _lifeline is not None:
        _lifeline.finish()


def stop(code: int) -> NoReturn:
    """Ends a process that was told to stop, and all others with it. Whatever must be saved has been.

    At once, not by the interpreter's own way out: a signal in the middle of a compilation leaves objects behind on
    which that crashes.
    """
    if _lifeline is not None:
        _lifeline.leave(code, "was stopped by a signal", lambda: None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(error: object, code: int) -> NoReturn:
    """Ends with one line that says what is wrong, the other processes with it."""
    if _lifeline is not None:
        _lifeline.leave(code, f"failed: {error}", lambda: complain(f"error: {error}"))
    complain(f"error: {error}")
    sys.exit(code)


def fail_unexpectedly(error: BaseException) -> None:
    """Ends with the error's traceback, the other processes with it. Returns if there are none."""
    if _lifeline is None:
        return
    # What another process's end does to this one's collective operations looks like an error in here.
    time.sleep(OTHERS_FIRST_SECONDS)
    reason = f"failed: {type(error).__name__}: {first_line(error)}"
    _lifeline.leave(1, reason, lambda: traceback.print_exception(error))
