import contextlib
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mae_jax.runtime import processes
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import find_place, may_be_tpu_pod, meet
from tests.runs import ROOT

OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "70001", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}  # fmt: skip


def place_from_flags(coordinator, count, index):
    return find_place(coordinator, count, index, OPEN_MPI)  # which they override


def place_from(environment):
    return find_place(None, None, None, environment)


def place(count, index, devices=(), **coordinator):
    return coordinator | {"num_processes": count, "process_id": index, "local_device_ids": list(devices)}


def test_without_flags_and_launchers_there_is_one_process():
    assert place_from({"HOME": "/root"}) is None
    assert place_from_flags("[fe80::1]:99", 1, 0) is None


def test_the_flags_say_where_a_process_is():
    assert place_from_flags("10.0.0.1:99", 4, 3) == place(4, 3, coordinator_address="10.0.0.1:99")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, None), "--process_count and --process_index missing: .*--coordinator=HOST:PORT"),
        ((None, 2, 0), "--coordinator missing"),
        (("host:1", 0, 0), r"--process_index=0 is not one of the --process_count=0 "),
        (("host:1", 2, 2), r"--process_index=2 is not one of the --process_count=2 "),
        (("host:1", 2, -1), "--process_index=-1 is not one of"),
        (("host", 2, 0), "--coordinator=host is not HOST:PORT"),
        (("host:99999", 2, 0), "is not HOST:PORT"),
        ((":99", 2, 0), "is not HOST:PORT"),
        (("http://host:99", 2, 0), "is not HOST:PORT"),
    ],
)
def test_impossible_flags_are_refused(flags, message):
    with pytest.raises(UserError, match=message) as error:
        place_from_flags(*flags)
    assert "\n" not in str(error.value)


def test_the_launchers_say_how_many_processes_there_are_and_open_mpi_counts_inside_a_slurm_job():
    assert place_from(SLURM) == place(2, 1)
    assert place_from(SLURM | OPEN_MPI) == place(4, 3, [1])
    assert place_from(OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "a:1"}) == place(4, 3, [1])
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS=a is not HOST:PORT"):
        place_from(OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "a"})


@pytest.mark.parametrize(
    "environment",
    [
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun with one task, in a job of two
        SLURM | {"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_NODELIST": None, "SLURM_STEP_ID": None},  # the batch script
        SLURM | {"SLURM_STEP_NUM_TASKS": None, "SLURM_PROCID": None},  # a shell of salloc
    ],
)
def test_one_process_of_a_launcher_is_alone(environment):
    assert place_from({name: value for name, value in environment.items() if value is not None}) is None


@pytest.mark.parametrize(
    ("tasks", "visible", "expected"),
    [
        ("1(x2)", "0,1,2,3", []),  # a task a node has all of its GPUs
        ("4(x2)", "0,1,2,3", [2]),  # a task a GPU
        ("4(x2)", None, [2]),
        ("4(x2)", "2", []),  # Slurm has bound one to each already
        ("4(x2),3", "0,1,2,3", [2]),
    ],
)
def test_processes_that_share_a_host_have_a_gpu_each(tasks, visible, expected):
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": "2"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert place_from(environment)["local_device_ids"] == expected


@pytest.mark.parametrize(
    ("environment", "platforms", "expected"),
    [
        ({}, None, True),  # a laptop too: JAX looks for chips, not at the network
        ({}, "cpu", False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None, False),  # a notebook's container, for example
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b"}, None, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, None, True),
    ],
)
def test_jax_is_asked_about_a_tpu_pod_where_it_can_know(environment, platforms, expected):
    assert may_be_tpu_pod(environment, platforms) == expected


def start_program(**environment):
    program = "import time, mae_jax.runtime.processes as p; t = time.time(); p.start(); print(time.time() - t)"
    left_out = ("JAX_PLATFORMS", "KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES")
    environment |= {name: value for name, value in os.environ.items() if name not in left_out}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)


def test_an_ordinary_machine_is_one_process_at_once_and_without_a_word():
    done = start_program()
    assert done.returncode == 0 and done.stderr == "" and float(done.stdout) < 1, done


def test_open_mpi_without_an_address_is_told_how_to_give_one():
    later = {name: value for name, value in OPEN_MPI.items() if name != "OMPI_MCA_orte_hnp_uri"}  # release 5
    done = start_program(**later)
    assert "mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT" in done.stderr.splitlines()[-1]


@pytest.fixture
def port():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    yield port
    if processes._door:
        processes._door.close()


def meet_all(port, count):
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda index: meet(f"localhost:{port}", count, index), reversed(range(count))))


def test_all_learn_where_jax_s_service_is_whoever_comes_first_and_strangers_change_nothing(port):
    def call():
        for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b"0", b"3", b"-1"):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port)) as stranger:
                stranger.sendall(text)

    threading.Timer(0.3, call).start()
    (address,) = set(meet_all(port, 3))
    assert address.startswith("localhost:") and address != f"localhost:{port}"


def test_a_newcomer_to_the_port_of_a_run_or_of_another_program_is_refused(port, monkeypatch):
    monkeypatch.setattr(processes, "ANSWER_SECONDS", 0.3)
    meet_all(port, 2)
    with pytest.raises(UserError, match=rf"process 0 cannot listen on port {port} \(Address already in use\): choose"):
        meet(f"localhost:{port}", 2, 0)
    with pytest.raises(
        UserError, match=f"process 1 of 2 cannot find process 0 at localhost:{port}: another run or program"
    ):
        meet(f"localhost:{port}", 2, 1)


def test_a_program_that_gives_another_answer_is_not_process_0(port):
    with socket.create_server(("localhost", port)) as server:

        def serve():
            with server.accept()[0] as visitor:
                visitor.sendall(b"HTTP/1.0 400")

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError, match="another run or program listens there"):
            meet(f"localhost:{port}", 2, 1)
