"""The processes of a run: one, or one for each host of a pod. Only process 0 writes.

`jax.distributed` connects them, and ends all if one sends no heartbeats, but does not say why. So every message between
processes can also carry a failure (`_exchange`): during preparation, all exit with the failed one's code and reason.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mae_jax.runtime.errors import UserError, complain, first_line

START_SECONDS = 300  # for all processes to connect: hosts do not start at the same time
ANSWER_SECONDS = 10  # for process 0 to answer on the coordinator's port
HEARTBEAT_SECONDS = 20  # without a heartbeat, after which JAX considers a process lost
TOLD_SECONDS = 20  # for all processes to learn of a failure
LAST_SECONDS = 2  # process 0 ends this much later, since JAX then aborts all processes
PADDING = 4096  # bytes; each new size compiles a program
# A launcher's variables: number of processes, index, index on this host, processes per host ("4", or "4(x2),3").
# Open MPI comes first: its processes inherit the variables of the Slurm step in which its daemons run.
# For Slurm, the step's number: JAX reads the job's SLURM_NTASKS, which is set in a shell of salloc too.
OPEN_MPI = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")

_door: socket.socket | None = None


def find_place(
    coordinator: str | None, count: int | None, index: int | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` for one of several processes; None for a single process.

    The command line takes precedence over Open MPI, and that over Slurm. JAX finds their coordinator, unless
    `JAX_COORDINATOR_ADDRESS` (HOST:PORT) or `JAX_COORDINATOR_PORT` is set.
    """
    given = {"--coordinator": coordinator, "--process_count": count, "--process_index": index}
    missing = [flag for flag, value in given.items() if value is None]
    if not missing:
        _check_address(coordinator, "--coordinator")
        if not 0 <= index < count:
            raise UserError(f"--process_index={index} is not one of the --process_count={count} that begin with 0")
        place = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
        return place | {"local_device_ids": []} if count > 1 else None
    if len(missing) < len(given):
        flags = "--coordinator=HOST:PORT --process_count=N --process_index=I"
        raise UserError(f"{' and '.join(missing)} missing: several processes are started with {flags}")
    for size, rank, local_rank, local_size in (OPEN_MPI, SLURM):
        if rank in environment and int(environment.get(size, 1)) > 1:
            if address := environment.get("JAX_COORDINATOR_ADDRESS"):
                _check_address(address, "JAX_COORDINATOR_ADDRESS")
            alone = re.fullmatch(r"1(\(x\d+\))?", environment.get(local_size, "1"))
            bound = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0  # each process sees only its own GPU
            devices = [] if alone or bound else [int(environment[local_rank])]  # []: all visible ones
            place = {"num_processes": int(environment[size]), "process_id": int(environment[rank])}
            return place | {"local_device_ids": devices}
    return None


def _check_address(address: str, name: str) -> None:
    found = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):(\d+)", address)
    if not found or not 0 < int(found[2]) < 65536:
        raise UserError(f"{name}={address} is not HOST:PORT, for example 10.0.0.1:12345")


def may_be_tpu_pod(environment: Mapping[str, str], platforms: str | None) -> bool:
    """Whether JAX should look for other TPU hosts; left alone, it takes any Kubernetes container for part of a job."""
    if platforms == "cpu":
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:
        return "KUBERNETES_SERVICE_HOST" not in environment
    return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1


def meet(coordinator: str, count: int, index: int) -> str:
    """Returns the address of JAX's service: process 0 sends it to all processes that connect to the coordinator.

    JAX's service gets a new port: on a given one another run's service might listen too, and a process that joins the
    wrong one ends that run (jax 0.10.2). Process 0 keeps the coordinator's port, but answers nobody once all have come.
    """
    global _door
    host, port = coordinator.rsplit(":", 1)
    if index == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            _door = socket.create_server(("", int(port)), family=family, dualstack_ipv6=both, backlog=1024)
        except OSError as error:
            raise UserError(
                f"process 0 cannot listen on port {port} ({os.strerror(error.errno)}): choose another port: "
                "--coordinator=HOST:PORT"
            ) from error
        with socket.create_server(("", 0)) as server:
            service = server.getsockname()[1]
        awaited = set(range(1, count))
        while awaited:
            with contextlib.suppress(OSError, ValueError), _door.accept()[0] as visitor:
                visitor.settimeout(ANSWER_SECONDS)
                if (other := int(visitor.recv(16))) in range(1, count):  # twice, if it was started again
                    visitor.sendall(b"%d" % service)
                    awaited.discard(other)
        return f"{host}:{service}"
    while True:
        with contextlib.suppress(OSError):  # process 0 is not there yet
            door = socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS)
            break
        time.sleep(0.5)
    with door, contextlib.suppress(OSError, ValueError):
        door.sendall(b"%d" % index)
        return f"{host}:{int(door.recv(16))}"
    raise UserError(
        f"process {index} of {count} cannot find process 0 at {coordinator}: another run or program listens "
        "there; choose another port: --coordinator=HOST:PORT"
    )


def start(coordinator: str | None = None, count: int | None = None, index: int | None = None, *, saves=False) -> None:
    """Connects the run's processes, if several, before JAX starts. `saves`: all save if one gets SIGTERM."""
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
    if place["process_id"] if place else jax.process_index():  # only process 0 keeps its standard output
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
    return process_count() == 1 or jax.process_index() == 0


def from_main(value: Any) -> Any:
    """Process 0's value, which must fit into JSON, in all processes. All must call it, as the next three."""
    return value if process_count() == 1 else json.loads(_exchange(json.dumps(value) if is_main() else "")[0])


def sum_of_all(number: int) -> int:
    return sum(from_all(number))


def from_all(value: Any) -> list[Any]:
    """Each process's value, which must fit into JSON, in all of them."""
    return [value] if process_count() == 1 else [json.loads(text) for text in _exchange(json.dumps(value))]


def wait_for_all() -> None:
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
