"""Finds the cost of a training step by compiling it, also for devices that this machine lacks."""

import contextlib
import importlib.util
import math
import os
import re
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from mae_jax.runtime.console import si
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.runtime.memory import MIB, bytes_on_a_device
from mae_jax.runtime.mesh import all_devices, check_cpu_devices
from mae_jax.training.compilation import compile_fitting_step
from mae_jax.training.state import TrainState
from mae_jax.training.step import memory_in_bytes


class StepCost(NamedTuple):
    """The cost of a step on one device, in bytes unless noted."""

    params: int  # trained parameters
    optimizer: int
    rest: int  # frozen parameters, averages, statistics, the batch
    temporaries: int  # activations, gradients and whatever else lives only during the step
    total: int  # the sum, with the compiler's padding
    flops: float  # as counted by XLA: a loop's body only once
    seconds: float  # of compilation
    compiled: jax.stages.Compiled


def devices_for(topology: str | None) -> list[jax.Device]:
    """The devices to compile for; a topology's devices cannot hold arrays or run programs. Call it before JAX starts.

    A topology is "cpu:64" for 64 emulated devices, or a TPU slice by generation and shape, such as "v5e:4x8" or
    "v5p:4x4x4", which needs libtpu (`pip install jax[tpu]`) but no TPU and no network; None: this machine's devices.
    Raises UserError for an unknown topology or without libtpu.
    """
    if topology is None:
        return all_devices()
    generation, _, shape = topology.partition(":")
    size = r"[1-9]\d{0,5}"
    if not re.fullmatch(rf"cpu:\d+|v\w+:{size}(x{size}){{0,2}}", topology):
        raise UserError(f"topology {topology!r} is neither cpu:COUNT nor a TPU slice such as v5e:4x8 or v5p:4x4x4")
    jax.config.update("jax_platforms", "cpu")
    return _cpus(int(shape)) if generation == "cpu" else _tpus(topology, [int(side) for side in shape.split("x")])


def _cpus(count: int) -> list[jax.Device]:
    check_cpu_devices("topology cpu:", count)
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise UserError(f"topology cpu:{count}: JAX has started with {len(jax.devices())} devices; start a new process")
    return jax.devices()[:count]


def _tpus(topology: str, sides: list[int]) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f'topology {topology} needs libtpu, but no TPU: pip install "jax[tpu]"')
    # Without these, libtpu outside the cloud looks for a metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # only programs that run on a TPU must load it alone
    from jax.experimental import topologies

    # A host has 2 x 2 chips, or fewer in a narrower slice.
    on_host = [*(math.gcd(2, side) for side in sides[:2]), 1, 1][:3]
    try:
        return topologies.get_topology_desc(topology, platform="tpu", chips_per_host_bounds=on_host).devices
    except (RuntimeError, AttributeError) as error:  # errors of JAX, and of a broken libtpu
        raise UserError(
            f"topology {topology} is unknown to libtpu ({first_line(error)}); it knows slices such as v5e:4x8, "
            "v5p:4x4x4 and v6e:8x8"
        ) from error


def try_step(step_fn, state: TrainState, batch: dict, key: jax.Array, mesh: Mesh) -> StepCost:
    """Compiles a step for an abstract state (with its layout) and batch; creates no array."""
    start = time.perf_counter()
    compiled = compile_fitting_step(step_fn, state, batch, jax.ShapeDtypeStruct(key.shape, key.dtype), mesh)
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    params, optimizer = bytes_on_a_device(state.params), bytes_on_a_device(state.opt_state)
    rest, flops = analysis.argument_size_in_bytes - params - optimizer, (compiled.cost_analysis() or {}).get("flops")
    return StepCost(
        params, optimizer, rest, analysis.temp_size_in_bytes, memory_in_bytes(compiled),
        math.nan if flops is None else flops, seconds, compiled,
    )  # fmt: skip


def describe_cost(cost: StepCost, mesh: Mesh, step_flops: int) -> list[str]:
    """Memory and compute of one device, in lines; `step_flops` is our own count for one step on all devices."""
    names = ("parameters", "optimizer", "batch and rest", "temporaries")
    memory = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in zip(names, cost, strict=False))
    count, kind = mesh.devices.size, mesh.devices.flat[0].device_kind
    rows = {
        "compiled": f"in {cost.seconds:.1f} s for {count} x {kind}; the next lines are for one device and one step",
        "memory": f"{cost.total / MIB:,.1f} MiB: {memory}",
        "compute": f"{si(step_flops / count)}FLOP needed; XLA counts {si(cost.flops)}FLOP, each loop's body once",
    }
    return [f"  {name:<9} {text}" for name, text in rows.items()]
