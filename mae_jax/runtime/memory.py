"""The memory of devices and hosts, and whether a run fits into it."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from mae_jax.runtime.errors import UserError

MIB = 2**20
LESS = "less is needed with a smaller data.batch_size, more train.accumulate_steps, model.remat=True, a smaller "
LESS += "model.image_size or, on several devices, a larger mesh.fsdp"


def check_memory(need: int | None, mesh: Mesh) -> None:
    """Raises UserError if `need` (bytes a device; None: unknown) exceeds the memory of the mesh's devices."""
    devices = mesh.local_devices
    has = device_memory(devices[0], len(devices))
    if need is not None and has is not None and need > has:
        where = "this machine, or its container, has" if devices[0].platform == "cpu" else "a device has"
        shared = f" for each of {len(devices)} devices" if devices[0].platform == "cpu" and len(devices) > 1 else ""
        raise UserError(
            f"a step needs {need / MIB:,.0f} MiB of memory, but {where} {has / MIB:,.0f} MiB{shared}: {LESS}"
        )


def bytes_on_a_device(tree) -> int:
    """Bytes on each device of a tree of (abstract) arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def device_memory(device: jax.Device, count: int = 1) -> int | None:
    """Bytes of a device that JAX may use; None: unknown. `count` CPU devices share the host's memory."""
    if device.platform == "cpu":
        return host_memory() // count
    return (device.memory_stats() or {}).get("bytes_limit")


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that a process can have, swap included: the machine's or its container's. `root` holds proc and sys."""
    swap = sum(int(line.split()[1]) * 1024 for line in _lines(root / "proc/meminfo") if line.startswith("SwapTotal:"))
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine + swap, *_limits_of_groups(root, swap)])


def _limits_of_groups(root: Path, swap: int) -> Iterator[int]:
    """The memory limits of this process's control groups (version 1 or 2) and of all groups that contain them.

    In a container that does not see the outer groups, its own limit is at the mount point.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            mount = root / "sys/fs/cgroup" / controllers
            folder = mount / path.lstrip("/")
            for group in (folder, *folder.parents[: len(folder.parts) - len(mount.parts)]):
                limit = _number(group / ("memory.limit_in_bytes" if controllers else "memory.max"))
                if limit is not None:
                    extra = _number(group / "memory.swap.max")
                    yield limit + (swap if extra is None else min(extra, swap))


def _lines(file: Path) -> list[str]:
    """The lines of a file; empty if it does not exist (not Linux)."""
    with contextlib.suppress(OSError):
        return file.read_text().splitlines()
    return []


def _number(file: Path) -> int | None:
    """The number in a file; None if it does not exist or has another word, such as "max"."""
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None
