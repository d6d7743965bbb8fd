"""Plans a run from its settings, describes it, and compiles its step, also for devices that this machine lacks."""

import functools
import importlib.util
import math
import os
import re
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.resolutions import Stage, make_stages, sizes_from
from mae_jax.data.sources import describe_sources
from mae_jax.objectives.objective import Objective, Variables
from mae_jax.runtime import hlo
from mae_jax.runtime.chips import GPUS, MEMORY_FRACTION, chip_of, gpu_devices
from mae_jax.runtime.console import si
from mae_jax.runtime.cost import read_kernels, totals
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.runtime.memory import LESS, MIB, bytes_on_a_device, check_memory
from mae_jax.runtime.mesh import (
    all_devices,
    batch_sharding,
    check_cpu_devices,
    compiler_options,
    lowering_for,
    replicated,
)
from mae_jax.runtime.seeds import make_key
from mae_jax.settings.fields import INT32_MAX
from mae_jax.training.optimizers import fit_warmup, make_optimizer, make_schedule, peak_learning_rate
from mae_jax.training.step import StateInit, TrainState, TrainStep, abstract_state, make_init, make_train_step


class Plan(NamedTuple):
    total_steps: int
    warmup_steps: int
    stages: tuple[Stage, ...]  # of image sizes
    init: StateInit
    abstract: TrainState  # shapes, dtypes and layout of the state
    step_fn: TrainStep  # not compiled


def make_plan(config: ConfigDict, objective: Objective, mesh: Mesh) -> Plan:
    """Plans a run on a mesh, perhaps of other machines' devices."""
    train, batch_size = config.train, config.data.batch_size
    steps_per_epoch = max(1, objective.num_train // batch_size)
    total_steps = train.steps or max(1, round(train.epochs * steps_per_epoch))
    if total_steps > INT32_MAX:
        raise UserError(f"train.epochs={train.epochs} is more than {INT32_MAX:,} steps: make the run shorter")
    warmup_steps = fit_warmup(round(config.optimizer.warmup_epochs * steps_per_epoch), total_steps)
    schedule = make_schedule(config.optimizer, batch_size, warmup_steps, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule, decay_tokens=objective.decay_tokens)
    init = make_init(objective.init, optimizer, keep_average=train.ema_decay is not None)
    step_fn = make_train_step(
        objective.loss_fn, optimizer, schedule, mesh, train.accumulate_steps, train.ema_decay,
        mixes_pairs=objective.mixes_pairs, skip_nonfinite=train.skip_nonfinite,
    )  # fmt: skip
    stages = make_stages(train.resolutions, objective.model.image_size, total_steps)
    return Plan(total_steps, warmup_steps, stages, init, abstract_state(init, mesh), step_fn)


def describe_plan(config: ConfigDict, objective: Objective, mesh: Mesh, plan: Plan) -> list[str]:
    """Lines that describe a run."""
    data, train, optimizer, steps = config.data, config.train, config.optimizer, plan.total_steps
    state, devices = plan.abstract, mesh.devices.flat
    parts = f" in {train.accumulate_steps} parts" if train.accumulate_steps > 1 else ""
    passes = steps * data.batch_size / objective.num_train
    rows = objective.describe(Variables(state.params, state.frozen, state.statistics))
    rows["data"] = "\n".join(describe_sources(data.name, objective.train_source, objective.eval_source))
    rows["batch"] = f"{data.batch_size}{parts}, {steps:,} steps = {passes:,.1f} epochs"
    if len(plan.stages) > 1:
        ends = [*(stage.first_step for stage in plan.stages[1:]), steps]
        rows["stages"] = "; ".join(
            f"{stage.image_size[0]} x {stage.image_size[1]} pixels up to step {end:,} "
            f"({si(objective.train_flops(stage.image_size))}FLOP an image)"
            for stage, end in zip(plan.stages, ends, strict=True)
        )
    rate = f"{optimizer.name}, peak rate {peak_learning_rate(optimizer, data.batch_size):.3g}"
    rows["schedule"] = f"{rate}, warm-up {plan.warmup_steps:,} steps, then {optimizer.schedule}"
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    processes = f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}"
    rows["mesh"] = f"{axes} ({len(devices)} x {devices[0].device_kind}, {processes})"
    return "\n".join(f"  {name:<9} " + text.replace("\n", f"\n{'':12}") for name, text in rows.items()).split("\n")


def make_train_key(seed: int, mesh: Mesh) -> jax.Array:
    """The key of the training steps, on every device."""
    return jax.jit(functools.partial(make_key, seed, "train"), out_shardings=replicated(mesh))()


def compile_plan(
    plan: Plan, objective: Objective, start_step: int, key: jax.Array, mesh: Mesh
) -> tuple[TrainStep, list[str]]:
    """Compiles the step for each image size from `start_step` on; a log line for each. UserError if memory is short."""
    if start_step == plan.total_steps:
        return plan.step_fn, []
    compiled, lines = {}, []
    for size in sizes_from(plan.stages, start_step):
        batch, which = objective.batch, ""
        if len(plan.stages) > 1:
            count, _, _, channels = batch["image"].shape
            batch = batch | {"image": jax.ShapeDtypeStruct((count, *size, channels), batch["image"].dtype)}
            which = f"of {size[0]} x {size[1]} pixels "
        start = time.perf_counter()
        compiled[size] = step = compile_train_step(plan.step_fn, plan.abstract, batch, key, mesh)
        need, seconds = memory_in_bytes(step), time.perf_counter() - start
        check_memory(need, mesh)
        lines.append(f"  step      {which}compiled in {seconds:.1f} s, needs {need / MIB:,.0f} MiB per device")

    def step_of_size(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        return compiled[batch["image"].shape[1:3]](state, batch, key)

    return step if len(compiled) == 1 else step_of_size, lines


def compile_train_step(
    step_fn: TrainStep, state: TrainState, batch: dict, key: jax.Array, mesh: Mesh, options: dict | None = None
) -> jax.stages.Compiled:
    """Compiles the step, which donates the state; arrays may be abstract. UserError if a device's memory is short.

    `options` are more of the compiler's.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        step_fn,
        donate_argnums=0,
        in_shardings=(layout, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(layout, replicated(mesh)),
    )
    try:
        with lowering_for(mesh):
            lowered = step.lower(state, batch, key)
        return lowered.compile((compiler_options(mesh) or {}) | (options or {}) or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        kind = mesh.devices.flat[0].device_kind
        raise UserError(f"the step does not fit into {kind} ({first_line(error)}); {LESS}") from error


def memory_in_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes on one device for the compiled step: state, batch and temporaries."""
    found = compiled.memory_analysis()
    sizes = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    return sizes - found.alias_size_in_bytes


def describe_cost(
    step: jax.stages.Compiled, state: TrainState, mesh: Mesh, step_flops: int, seconds: float
) -> list[str]:
    """Memory and compute of a step on one device; `step_flops` is our own count for all. `seconds`: to compile."""
    analysis, flops = step.memory_analysis(), (step.cost_analysis() or {}).get("flops")
    parts = {"parameters": bytes_on_a_device(state.params), "optimizer": bytes_on_a_device(state.opt_state)}
    parts["batch and rest"] = analysis.argument_size_in_bytes - sum(parts.values())
    parts["temporaries"] = analysis.temp_size_in_bytes  # activations, gradients and whatever else a step alone needs
    memory = ", ".join(f"{name} {size / MIB:,.1f}" for name, size in parts.items())
    counted = f"; XLA counts {si(flops)}FLOP, each loop's body once" if flops is not None else ""
    count, kind = mesh.devices.size, mesh.devices.flat[0].device_kind
    return [
        f"  compiled  in {seconds:.1f} s for {count} x {kind}; the next lines are for one device and one step",
        f"  memory    {memory_in_bytes(step) / MIB:,.1f} MiB: {memory}",
        f"  compute   {si(step_flops / count)}FLOP needed{counted}",
    ]


def describe_chip(step: jax.stages.Compiled, mesh: Mesh, batch_size: int) -> list[str]:
    """A chip's memory and the rate that it could reach; none if it is not known. UserError if its memory is short."""
    chip = chip_of(mesh.devices.flat[0])
    if chip is None:
        return []
    check_memory(memory_in_bytes(step), mesh)
    share = f", {chip.usable_memory / chip.memory:.0%} of its memory ({MEMORY_FRACTION})" if chip.name in GPUS else ""
    lines = [f"  chip      {chip.name}: the step fits into {chip.usable_memory / MIB:,.0f} MiB{share}"]
    try:
        kernels = read_kernels(hlo.parse(step.as_text()))
    except jax.errors.JaxRuntimeError:  # seen with a libtpu newer than this JAX
        return lines
    found, rate = totals(kernels), batch_size / sum(kernel.seconds(chip) for kernel in kernels)
    if chip.name not in GPUS and not found.cycles:  # a compiler that tells none
        return lines
    basis = f"at most by roofline: {found.launches:,} kernels move {si(found.bytes)}B, multiply {si(found.flops)}FLOP"
    if chip.name not in GPUS:
        basis = f"by the compiler's estimate of {si(found.cycles)}cycles, at {si(chip.clock)}Hz"
    alone = ", without what chips send to each other" if mesh.devices.size > 1 and chip.name in GPUS else ""
    return [*lines, f"  speed     {rate:,.0f} images/s {basis}{alone}"]


def devices_for(topology: str | None) -> list[jax.Device]:
    """The devices to compile for: "cpu:64" (emulated), GPUs such as "h100:8", TPUs ("v5p:4x4x4"), or None: those here.

    GPUs and TPUs need the packages of their compilers; programs for them cannot run. Call it before JAX starts.
    """
    if topology is None:
        return all_devices()
    size = r"[1-9]\d{0,5}"
    if not re.fullmatch(rf"cpu:\d+|({'|'.join(GPUS)}):{size}|v\w+:{size}(x{size}){{0,2}}", topology):
        gpus = ", ".join(f"{name}:COUNT" for name in GPUS)
        raise UserError(
            f"topology {topology!r} is neither cpu:COUNT nor a TPU slice such as v5e:4x8 or v5p:4x4x4 nor GPUs: {gpus}"
        )
    jax.config.update("jax_platforms", "cpu")
    name, *rest = topology.split(":")
    if name in GPUS:
        return gpu_devices(name, int(rest[0]))
    sides = [int(side) for side in topology.split(":")[1].split("x")]
    if topology.startswith("cpu:"):
        check_cpu_devices("topology cpu:", sides[0])
        jax.config.update("jax_num_cpu_devices", sides[0])
        return jax.devices()
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
