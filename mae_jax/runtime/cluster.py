"""Which process of how many this one is, and where process 0 listens: from the command line, Slurm or Open MPI.

Nothing here touches JAX or the network.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from mae_jax.runtime.errors import UserError

# Where a launcher does not name a port, one of these is taken, by the job's number: the ephemeral range's upper end.
FIRST_PORT, PORTS = 61440, 4096
FLAGS = "--coordinator=HOST:PORT --process_count=N --process_index=I"


class Place(NamedTuple):
    """One process among several."""

    coordinator: str  # HOST:PORT of process 0
    count: int
    index: int
    local_devices: list[int] | None = None  # numbers of the GPUs that are this process's; None: all of the host


def place_from_flags(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
    """What the command line says; None if it says nothing.

    Raises:
      UserError: for one flag without the others, or values that cannot be.
    """
    given = {"coordinator": coordinator, "process_count": count, "process_index": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return None
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: several processes are started with {FLAGS}")
    check_address(coordinator, "--coordinator")
    if count < 1:
        raise UserError(f"--process_count={count} must be at least 1")
    if not 0 <= index < count:
        raise UserError(f"--process_index={index} is outside 0 ... {count - 1} (--process_count={count})")
    return Place(coordinator, count, index)


def place_from_environment(environment: Mapping[str, str]) -> Place | None:
    """What Open MPI or Slurm say in their variables; None for one process, and where neither started this one.

    `JAX_COORDINATOR_ADDRESS` (HOST:PORT) and `JAX_COORDINATOR_PORT` decide where they are set.

    Raises:
      UserError: if there are several processes and it cannot be known where process 0 is.
    """
    # Open MPI first: its processes inherit the variables of the Slurm step that its daemons run in.
    return _open_mpi(environment) or _slurm(environment)


def _open_mpi(environment: Mapping[str, str]) -> Place | None:
    count = int(environment.get("OMPI_COMM_WORLD_SIZE", 1))
    if count == 1:
        return None
    address, uri = environment.get("JAX_COORDINATOR_ADDRESS"), environment.get("OMPI_MCA_orte_hnp_uri", "")
    if address:
        check_address(address, "JAX_COORDINATOR_ADDRESS")
    else:
        # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911" or "...;tcp6://[fe80::1,2620::2]:43370": where mpirun runs.
        found = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^],]+))", uri)
        if not found:
            raise UserError(
                f"Open MPI started {count} processes but does not say where process 0 is: "
                "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT, with the host of process 0 and a free port of it"
            )
        address = f"{found[2] or f'[{found[3]}]'}:{_port(environment, int(found[1]) // PORTS)}"
    local = _local_devices(environment, environment["OMPI_COMM_WORLD_LOCAL_RANK"], "OMPI_COMM_WORLD_LOCAL_SIZE")
    return Place(address, count, int(environment["OMPI_COMM_WORLD_RANK"]), local)


def _slurm(environment: Mapping[str, str]) -> Place | None:
    # Of the step that srun started. (SLURM_NTASKS is the job's, also in a shell of salloc and in the batch script.)
    count = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if count == 1 or "SLURM_PROCID" not in environment:
        return None
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address:
        check_address(address, "JAX_COORDINATOR_ADDRESS")
    else:
        nodes = environment["SLURM_STEP_NODELIST"]  # "node001", "node001,host2", "node[001-015,020],host2"
        found = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
        job, step = (int(environment.get(name, 0)) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        address = f"{found[1]}{found[2] or ''}:{_port(environment, job + 257 * step)}"
    local = _local_devices(environment, environment.get("SLURM_LOCALID", "0"), "SLURM_STEP_TASKS_PER_NODE")
    return Place(address, count, int(environment["SLURM_PROCID"]), local)


def may_be_tpu_pod(environment: Mapping[str, str], platforms: str | None) -> bool:
    """Whether it is worth asking JAX if this host is one of several with TPUs.

    Not where that could only go wrong: JAX takes any Kubernetes container for a part of a job.

    Args:
      platforms: those that JAX is restricted to.
    """
    if platforms == "cpu":
        return False
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is None:
        return "KUBERNETES_SERVICE_HOST" not in environment
    return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES", 1)) > 1


def _port(environment: Mapping[str, str], number: int) -> int:
    return int(environment.get("JAX_COORDINATOR_PORT", FIRST_PORT + number % PORTS))


def _local_devices(environment: Mapping[str, str], local_index: str, tasks_name: str) -> list[int] | None:
    """One GPU for each process of a host that has several, unless the launcher has given each its own already."""
    tasks = environment.get(tasks_name, "1")  # "4", "4(x2)", "4(x2),3"
    one_each = environment.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return None if re.fullmatch(r"1(\(x\d+\))?", tasks) or one_each else [int(local_index)]


def check_address(address: str, name: str) -> None:
    """Raises UserError unless an address is HOST:PORT."""
    found = re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\]):(\d+)", address)
    if not found or not 0 < int(found[2]) < 65536:
        raise UserError(f"{name}={address} is not HOST:PORT, for example 10.0.0.1:12345")
