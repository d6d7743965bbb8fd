"""Whether a training step fits into memory, found before the first one is made."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from mae_jax.runtime.errors import UserError, first_line
from mae_jax.training.state import TrainState
from mae_jax.training.step import TrainStep, compile_train_step

MIB = 2**20
LESS = "less is needed with a smaller data.batch_size, more train.accumulate_steps, model.remat=True, a smaller "
LESS += "model.image_size or, on several devices, a larger mesh.fsdp"


def compile_fitting_step(
    step_fn: TrainStep, state: TrainState, batch: dict, key: jax.Array, mesh: Mesh
) -> jax.stages.Compiled:
    """`compile_train_step`; raises UserError if the compiler knows that a device has too little memory (a CPU's does
    not care)."""
    try:
        return compile_train_step(step_fn, state, batch, key, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        kind = mesh.devices.flat[0].device_kind
        raise UserError(f"the step does not fit into {kind} ({first_line(error)}); {LESS}") from error


def check_memory(need: int | None, mesh: Mesh) -> None:
    """Raises UserError if each device of a mesh needs more bytes than it has; None: what is needed is not known."""
    devices = mesh.local_devices
    has = device_memory(devices[0], len(devices))
    if need is not None and has is not None and need > has:
        where = "this machine, or its container, has" if devices[0].platform == "cpu" else "a device has"
        shared = f" for each of {len(devices)} devices" if devices[0].platform == "cpu" and len(devices) > 1 else ""
        raise UserError(
            f"a step needs {need / MIB:,.0f} MiB of memory, but {where} {has / MIB:,.0f} MiB{shared}: {LESS}"
        )


def device_memory(device: jax.Device, count: int = 1) -> int | None:
    """Bytes that JAX may take of a device; None: unknown. Devices of a CPU share the host's."""
    if device.platform == "cpu":
        return host_memory() // count
    return (device.memory_stats() or {}).get("bytes_limit")


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that a process can have here, with swap: the machine's memory, or what its container is allowed.

    Args:
      root: where proc and sys are.
    """
    swap = _swap(root)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + swap
    return min([machine, *_limits_of_groups(root, swap)])


def _swap(root: Path) -> int:
    with contextlib.suppress(OSError):  # not on Linux
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("SwapTotal:"):
                return int(line.split()[1]) * 1024
    return 0


def _limits_of_groups(root: Path, swap: int) -> Iterator[int]:
    """The limits of the control groups that this process is in, and of those around them, of version 2 and 1.

    A container that does not see the groups around it has its own where the outermost would be.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            mount = root / "sys/fs/cgroup" / controllers
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            folder = mount / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(mount) and (limit := _number(group / name)) is not None:
                    extra = _number(group / "memory.swap.max")
                    yield limit + (swap if extra is None else min(extra, swap))


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, or another word, such as "max"."""
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text())
    return None


def bytes_on_a_device(tree) -> int:
    """Bytes of a tree of (abstract) arrays with their layout that lie on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
