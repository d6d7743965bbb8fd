"""Several real processes of main.py on this machine, as the hosts of a pod have one each."""

import random
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import COMPILE_QUICKLY
from tests.runs import start

Ended = tuple[int, str, str]  # exit code, standard output, standard error


def free_port() -> int:
    """A port on which nobody listens just now."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def by_flags(count: int) -> list[tuple[list[str], dict[str, str]]]:
    """Arguments and variables of each process, started by hand."""
    common = [f"--coordinator=localhost:{free_port()}", f"--process_count={count}"]
    return [([*common, f"--process_index={index}"], {}) for index in range(count)]


def by_slurm(count: int) -> list[tuple[list[str], dict[str, str]]]:
    """The same as srun starts them."""
    step = {
        "SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_TASKS_PER_NODE": str(count), "SLURM_NTASKS": str(count),
    }  # fmt: skip
    return [([], step | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}) for index in range(count)]


def by_open_mpi(count: int) -> list[tuple[list[str], dict[str, str]]]:
    """The same as mpirun starts them."""
    uri = f"{random.randrange(10**6) * 4096}.0;tcp://127.0.0.1:34911"
    world = {"OMPI_COMM_WORLD_SIZE": str(count), "OMPI_COMM_WORLD_LOCAL_SIZE": str(count), "OMPI_MCA_orte_hnp_uri": uri}
    ranks = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    return [([], world | dict.fromkeys(ranks, str(index))) for index in range(count)]


def start_processes(
    count: int, *arguments: str | list[str], devices: int = 2, launcher: Callable = by_flags
) -> list[subprocess.Popen]:
    """Starts main.py `count` times with `devices` CPU devices each.

    Args:
      arguments: the same for all; a list has one for each process.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {COMPILE_QUICKLY}"
    processes = []
    for index, (place, environment) in enumerate(launcher(count) if count > 1 else [([], {})]):
        own = [argument if isinstance(argument, str) else argument[index] for argument in arguments]
        processes.append(start(*own, *place, **environment, XLA_FLAGS=flags))
    return processes


def wait_for_end(processes: list[subprocess.Popen], timeout: float = 300) -> list[Ended]:
    """Waits for the end of all; what is not over by then is killed, and told by the exit code -9."""
    deadline, ended = time.monotonic() + timeout, []
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        ended.append((process.returncode, out, err))
    return ended


def run_processes(count: int, *arguments: str | list[str], **settings) -> list[Ended]:
    """Runs main.py in `count` processes to the end of all."""
    return wait_for_end(start_processes(count, *arguments, **settings))


def wait_for_step(processes: list[subprocess.Popen], workdir: Path, step: int) -> None:
    """Returns when a run has reported `step`, or one of its processes has ended."""
    metrics = Path(workdir) / "metrics.jsonl"
    while all(process.poll() is None for process in processes):
        if metrics.exists() and f'{{"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
