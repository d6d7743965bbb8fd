"""Finds this process's index, the number of processes and their coordinator, where JAX's detection needs help."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

from mae_jax.runtime.errors import UserError

ANSWER_SECONDS = 10
OTHER_PORT = "choose another port: --coordinator=HOST:PORT"
FLAGS = "--coordinator=HOST:PORT --process_count=N --process_index=I"
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
    `JAX_COORDINATOR_ADDRESS` (HOST:PORT) or `JAX_COORDINATOR_PORT` is set. UserError for missing flags or bad values.
    """
    given = {"coordinator": coordinator, "process_count": count, "process_index": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if not missing:
        check_address(coordinator, "--coordinator")
        if count < 1:
            raise UserError(f"--process_count={count} must be at least 1")
        if not 0 <= index < count:
            raise UserError(f"--process_index={index} is outside 0 ... {count - 1} (--process_count={count})")
        place = {"coordinator_address": coordinator, "num_processes": count, "process_id": index}
        return place | {"local_device_ids": []} if count > 1 else None
    if len(missing) < len(given):
        raise UserError(f"{' and '.join(missing)} missing: several processes are started with {FLAGS}")
    for size, rank, local_rank, local_size in (OPEN_MPI, SLURM):
        if rank in environment and int(environment.get(size, 1)) > 1:
            if address := environment.get("JAX_COORDINATOR_ADDRESS"):
                check_address(address, "JAX_COORDINATOR_ADDRESS")
            alone = re.fullmatch(r"1(\(x\d+\))?", environment.get(local_size, "1"))
            bound = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0  # each process sees only its own GPU
            devices = [] if alone or bound else [int(environment[local_rank])]  # []: all visible ones
            place = {"num_processes": int(environment[size]), "process_id": int(environment[rank])}
            return place | {"local_device_ids": devices}
    return None


def may_be_tpu_pod(environment: Mapping[str, str], platforms: str | None) -> bool:
    """Whether JAX should look for other TPU hosts: left alone, it takes any Kubernetes container for part of a job."""
    if platforms == "cpu":
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:
        return "KUBERNETES_SERVICE_HOST" not in environment
    return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1


def check_address(address: str, name: str) -> None:
    """Raises UserError unless an address is HOST:PORT."""
    found = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):(\d+)", address)
    if not found or not 0 < int(found[2]) < 65536:
        raise UserError(f"{name}={address} is not HOST:PORT, for example 10.0.0.1:12345")


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
            why = os.strerror(error.errno)
            raise UserError(f"process 0 cannot listen on port {port} ({why}): {OTHER_PORT}") from error
        with socket.create_server(("", 0)) as server:
            service = server.getsockname()[1]
        come = set()
        while len(come) < count - 1:
            with contextlib.suppress(OSError, ValueError), _door.accept()[0] as visitor:
                visitor.settimeout(ANSWER_SECONDS)
                come.add(range(1, count).index(int(visitor.recv(16))))
                visitor.sendall(b"%d" % service)
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
        f"there; {OTHER_PORT}"
    )
