"""What a step would take, found by compiling it without running it, also for devices that are not here."""

import contextlib
import importlib.util
import math
import os
import re
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from mae_jax.runtime.errors import UserError, first_line
from mae_jax.runtime.memory import MIB, bytes_on_a_device
from mae_jax.runtime.mesh import all_devices, check_cpu_devices
from mae_jax.runtime.text import si
from mae_jax.training.compilation import compile_fitting_step
from mae_jax.training.state import TrainState
from mae_jax.training.step import memory_in_bytes


class StepCost(NamedTuple):
    """What a step takes of one device; bytes unless said otherwise."""

    params: int  # those that train
    optimizer: int
    rest: int  # frozen parameters, averages, statistics, the batch
    temporaries: int  # activations, gradients, and what else lives during the step only
    total: int  # of all these, with what the compiler pads
    flops: float  # as XLA counts them: the body of a loop once, however often it runs
    seconds: float  # that compiling took
    compiled: jax.stages.Compiled


def devices_for(topology: str | None) -> list[jax.Device]:
    """The devices to compile for. Those of a topology cannot hold arrays or run what is compiled.

    Call it before JAX starts, which sees only CPUs if a topology is named.

    Args:
      topology: None for this machine's devices; "cpu:64" for 64 emulated ones; or a TPU slice by generation and shape,
        such as "v5e:4x8" or "v5p:4x4x4", which takes libtpu (`pip install jax[tpu]`) but no TPU and no network.

    Raises:
      UserError: for a topology that does not exist, or without libtpu.
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
        raise UserError(f'topology {topology} needs libtpu, though no TPU: pip install "jax[tpu]"')
    # Off the cloud libtpu would look for a server that tells it which machine it is on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # only a program that runs on a TPU needs it alone
    from jax.experimental import topologies

    # A host has four chips, 2 x 2, or fewer in a slice that is narrower.
    on_host = [*(math.gcd(2, side) for side in sides[:2]), 1, 1][:3]
    try:
        return topologies.get_topology_desc(topology, platform="tpu", chips_per_host_bounds=on_host).devices
    except (RuntimeError, AttributeError) as error:  # JAX's own errors, and those of a broken libtpu
        raise UserError(
            f"topology {topology} is unknown to libtpu ({first_line(error)}); it knows slices such as v5e:4x8, "
            "v5p:4x4x4 and v6e:8x8"
        ) from error


def try_step(step_fn, state: TrainState, batch: dict, key: jax.Array, mesh: Mesh) -> StepCost:
    """Compiles a step for an abstract state (with its layout) and batch; makes no array."""
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
    """Memory and compute of one device, a line each; `step_flops` of one step by our own count, over all devices."""
    names = ("parameters", "optimizer", "batch and rest", "temporaries")
    memory = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in zip(names, cost, strict=False))
    count, kind = mesh.devices.size, mesh.devices.flat[0].device_kind
    rows = {
        "compiled": f"in {cost.seconds:.1f} s for {count} x {kind}; the next lines are of one of them in one step",
        "memory": f"{cost.total / MIB:,.1f} MiB: {memory}",
        "compute": f"{si(step_flops / count)}FLOP needed; XLA counts {si(cost.flops)}FLOP, each loop's body once",
    }
    return [f"  {name:<9} {text}" for name, text in rows.items()]
