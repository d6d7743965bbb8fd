"""The memory of devices and hosts, and whether a run fits into it."""

import math
import os
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from mae_jax.runtime.chips import chip_of
from mae_jax.runtime.errors import UserError

MIB = 2**20
LESS = "less is needed with a smaller data.batch_size, more train.accumulate_steps, model.remat=True, a smaller "
LESS += "model.image_size or, on several devices, a larger mesh.fsdp"


def check_memory(need: int, mesh: Mesh) -> None:
    """Raises UserError if `need` (bytes a device) exceeds the memory of the mesh's devices."""
    device, count = mesh.local_devices[0], len(mesh.local_devices)
    has, on_cpu = device_memory(device, count), device.platform == "cpu"
    if has is not None and need > has:
        where = "this machine, or its container, has" if on_cpu else "a device has"
        shared = f" for each of {count} devices" if on_cpu and count > 1 else ""
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
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # it is not here, and programs are only compiled for it
        chip = chip_of(device)
        return chip and chip.usable_memory


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that a process can have, with swap: the machine's, or what control groups (version 1, 2) allow."""
    swap = sum(1024 * int(kib) for kib in re.findall(r"SwapTotal: *(\d+)", _read(root / "proc/meminfo")))
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + swap]
    for controllers, path in re.findall(r"(?m)^\d+:(memory|):/(.*)$", _read(root / "proc/self/cgroup")):
        group = root / "sys/fs/cgroup" / controllers / path
        for folder in (group, *group.parents):  # a container may see only the one at the mount point
            limit = _read(folder / ("memory.limit_in_bytes" if controllers else "memory.max"))
            extra = _read(folder / "memory.swap.max")
            if limit.isdigit():  # not "max"
                found.append(int(limit) + (min(int(extra), swap) if extra.isdigit() else swap))
    return min(found)


def _read(file: Path) -> str:
    """A file's text; empty if there is none (not Linux)."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
