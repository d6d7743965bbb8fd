"""Several real processes of main.py on this machine, as hosts of a pod have one each."""

import socket
import subprocess
import time
from pathlib import Path

from tests.conftest import COMPILE_QUICKLY
from tests.runs import start

Ended = tuple[int, str, str]  # exit code, standard output, standard error


def free_port() -> int:
    """A port on which nobody listens just now."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start_processes(count: int, *arguments: str, devices: int = 4, **environment: str) -> list[subprocess.Popen]:
    """Starts main.py `count` times with `devices` CPU devices each.

    Args:
      arguments: the same for all; a list has one for each process.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {COMPILE_QUICKLY}"
    coordinator = f"--coordinator=localhost:{free_port()}"
    processes = []
    for index in range(count):
        own = [argument if isinstance(argument, str) else argument[index] for argument in arguments]
        place = () if count == 1 else (coordinator, f"--process_count={count}", f"--process_index={index}")
        processes.append(start(*own, *place, **{"XLA_FLAGS": flags} | environment))
    return processes


def wait_for_all(processes: list[subprocess.Popen], timeout: float = 300) -> list[Ended]:
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


def run_processes(count: int, *arguments: str, **settings) -> list[Ended]:
    """Runs main.py in `count` processes to the end of all."""
    return wait_for_all(start_processes(count, *arguments, **settings))


def wait_for_step(processes: list[subprocess.Popen], workdir: Path, step: int) -> None:
    """Returns when a run has reported `step`, or one of its processes has ended."""
    metrics = Path(workdir) / "metrics.jsonl"
    while all(process.poll() is None for process in processes):
        if metrics.exists() and f'{{"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
