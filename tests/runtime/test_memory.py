import os
import types

import jax
import pytest

from mae_jax.runtime import memory
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.memory import MIB, check_memory, device_memory, host_memory
from tests.meshes import device_mesh

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.fixture
def host(tmp_path):
    """Returns a function that writes files of a machine, path=text, and gives their root."""

    def make(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return make


def test_the_memory_of_a_machine_without_containers_counts_with_its_swap(host):
    assert host_memory(host({})) == MACHINE
    assert host_memory(host({"proc/meminfo": "MemTotal: 9 kB\nSwapTotal:    2048 kB\n"})) == MACHINE + 2 * MIB


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": f"{MIB}\n", f"{V2}/a/memory.max": "max\n"},
        {"proc/self/cgroup": "0::/a/b\n", f"{V2}/a/b/memory.max": "max\n", f"{V2}/a/memory.max": f"{MIB}\n"},
        {"proc/self/cgroup": "0::/\n", f"{V2}/memory.max": f"{MIB}\n"},
        {"proc/self/cgroup": "0::/of/the/host\n", f"{V2}/memory.max": f"{MIB}\n"},
        {"proc/self/cgroup": "3:cpu:/x\n4:memory:/a\n0::/\n", f"{V1}/a/memory.limit_in_bytes": f"{MIB}\n",
         f"{V1}/memory.limit_in_bytes": "9223372036854771712\n"},
        {"proc/self/cgroup": "4:memory:/docker/1f\n", f"{V1}/memory.limit_in_bytes": f"{MIB}\n"},
    ],
    ids=["own", "around", "namespace", "host's path", "version 1", "version 1, host's path"],
)  # fmt: skip
def test_the_limit_of_a_container_counts_whichever_group_has_it(host, files):
    assert host_memory(host(files)) == MIB


@pytest.mark.parametrize("allowed, expected", [("max", 3 * MIB), (str(MIB), 2 * MIB), ("0", MIB)])
def test_a_container_has_as_much_swap_as_it_is_allowed(host, allowed, expected):
    files = {"proc/meminfo": "SwapTotal: 2048 kB\n", "proc/self/cgroup": "0::/\n", f"{V2}/memory.max": str(MIB)}
    assert host_memory(host(files | {f"{V2}/memory.swap.max": allowed})) == expected


def test_a_step_that_needs_more_than_there_is_is_refused_with_both_and_the_remedies(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 16 * MIB)
    check_memory(16 * MIB, device_mesh())
    with pytest.raises(UserError) as error:
        check_memory(16 * MIB + 1, device_mesh())
    text = str(error.value)
    assert text.startswith("a step needs 16 MiB of memory, but this machine, or its container, has 16 MiB")
    for remedy in ("data.batch_size", "train.accumulate_steps", "model.remat", "model.image_size"):
        assert remedy in text


def test_devices_of_a_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 16 * MIB)
    check_memory(2 * MIB, device_mesh(8))
    with pytest.raises(UserError, match="has 2 MiB for each of 8 devices"):
        check_memory(3 * MIB, device_mesh(8))


@pytest.mark.parametrize(
    "kind, expected", [("NVIDIA H100 80GB HBM3", 84942979072 * 3 // 4), ("TPU v5 lite", 16 * 2**30), ("other", None)]
)
def test_the_memory_of_a_chip_that_is_not_here_is_what_jax_would_take_of_it(kind, expected):
    def refuse():
        raise jax.errors.JaxRuntimeError("MemoryStats is only supported for addressable PjRt devices")

    absent = types.SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=refuse)
    assert device_memory(absent) == expected


@pytest.mark.parametrize("stats, expected", [({"bytes_limit": 7}, 7), ({}, None), (None, None)])
def test_the_memory_of_an_accelerator_is_what_jax_may_take_of_it(stats, expected):
    assert device_memory(types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats), 8) == expected
