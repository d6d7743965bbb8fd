import os
import subprocess
import sys

import pytest

from mae_jax.runtime.cluster import FIRST_PORT, PORTS, Place, may_be_tpu_pod, place_from_environment, place_from_flags
from mae_jax.runtime.errors import UserError
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


def test_without_flags_and_launchers_there_is_one_process():
    assert place_from_flags(None, None, None) is None
    assert place_from_environment({"HOME": "/root"}) is None


def test_the_flags_say_where_a_process_is():
    assert place_from_flags("10.0.0.1:99", 4, 3) == Place("10.0.0.1:99", 4, 3)
    assert place_from_flags("[fe80::1]:99", 1, 0) == Place("[fe80::1]:99", 1, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, None), "--process_count and --process_index missing: .*--coordinator=HOST:PORT"),
        ((None, 2, 0), "--coordinator missing"),
        (("host:1", 0, 0), "--process_count=0 must be at least 1"),
        (("host:1", 2, 2), r"--process_index=2 is outside 0 ... 1"),
        (("host:1", 2, -1), "--process_index=-1 is outside"),
        (("host", 2, 0), "--coordinator=host is not HOST:PORT"),
        (("host:99999", 2, 0), "is not HOST:PORT"),
        ((":99", 2, 0), "is not HOST:PORT"),
        (("http://host:99", 2, 0), "is not HOST:PORT"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message):
    with pytest.raises(UserError, match=message) as error:
        place_from_flags(*flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("uri", "host"),
    [
        ("1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp://10.96.0.1:34911", "10.96.0.1"),
        ("1531576320.0;tcp6://[fe80::b9b:ac5d:9cf0:b858,2620:10d::3000:2]:43370", "[fe80::b9b:ac5d:9cf0:b858]"),
    ],
)
def test_open_mpi_says_where_mpirun_runs(uri, host):
    place = place_from_environment(OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": uri})
    assert place == Place(f"{host}:{FIRST_PORT + 1531576320 // PORTS % PORTS}", 4, 3, [1])


def test_open_mpi_without_an_address_needs_one_and_takes_it_from_jax_s_variable():
    later = {name: value for name, value in OPEN_MPI.items() if name != "OMPI_MCA_orte_hnp_uri"}  # release 5
    with pytest.raises(UserError, match="Open MPI started 4 processes .*mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT"):
        place_from_environment(later)
    assert place_from_environment(later | {"JAX_COORDINATOR_ADDRESS": "a:1"}).coordinator == "a:1"
    with pytest.raises(UserError, match="JAX_COORDINATOR_ADDRESS=a is not HOST:PORT"):
        place_from_environment(later | {"JAX_COORDINATOR_ADDRESS": "a"})


def test_one_process_of_open_mpi_is_alone():
    assert place_from_environment(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node001", "node001"), ("node001,host2", "node001"), ("node[001-015],host2", "node001"),
        ("node[001,007-015],host2", "node001"), ("gpu-a-[3,5]", "gpu-a-3"), ("localhost", "localhost"),
    ],
)  # fmt: skip
def test_slurm_s_first_node_has_process_0(nodes, host):
    place = place_from_environment(SLURM | {"SLURM_STEP_NODELIST": nodes})
    assert place == Place(f"{host}:{FIRST_PORT + 70001 % PORTS}", 2, 1)


def test_steps_of_one_slurm_job_have_ports_of_their_own():
    ports = {place_from_environment(SLURM | {"SLURM_STEP_ID": str(step)}).coordinator for step in range(8)}
    assert len(ports) == 8
    assert place_from_environment(SLURM | {"JAX_COORDINATOR_PORT": "77"}).coordinator == "node007:77"


@pytest.mark.parametrize(
    "step",
    [
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun with one task, in a job of two
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_STEP_NODELIST": None, "SLURM_STEP_ID": None},  # the batch script
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_PROCID": None},  # a shell of salloc
    ],
)
def test_without_a_step_of_several_tasks_slurm_has_one_process(step):
    environment = {name: value for name, value in (SLURM | step).items() if value is not None}
    assert place_from_environment(environment) is None


def test_mpirun_inside_a_slurm_job_counts():
    assert place_from_environment(SLURM | OPEN_MPI).count == 4


@pytest.mark.parametrize(
    ("tasks", "visible", "expected"),
    [
        ("1(x2)", "0,1,2,3", None),  # a task a node has all of its GPUs
        ("4(x2)", "0,1,2,3", [2]),  # a task a GPU
        ("4(x2)", None, [2]),
        ("4(x2)", "2", None),  # Slurm has bound one to each already
        ("4(x2),3", "0,1,2,3", [2]),
    ],
)
def test_processes_that_share_a_host_have_a_gpu_each(tasks, visible, expected):
    environment = SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_LOCALID": "2"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert place_from_environment(environment).local_devices == expected


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


def test_an_ordinary_machine_is_one_process_at_once_and_without_a_word():
    program = "import time, mae_jax.runtime.processes as p; t = time.time(); p.start(); print(time.time() - t)"
    left_out = ("JAX_PLATFORMS", "KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == "" and float(done.stdout) < 1, done
