"""Compiles a run's training step for each image size, and checks that it fits into memory."""

import time

import jax
from jax.sharding import Mesh

from mae_jax.data.resolutions import sizes_from
from mae_jax.objectives.objective import Objective
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.runtime.memory import LESS, MIB, check_memory
from mae_jax.training.plan import Plan
from mae_jax.training.state import TrainState
from mae_jax.training.step import TrainStep, compile_train_step, memory_in_bytes


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
        compiled[size] = step = compile_fitting_step(plan.step_fn, plan.abstract, batch, key, mesh)
        need = memory_in_bytes(step)
        check_memory(need, mesh)
        text = "" if need is None else f", needs {need / MIB:,.0f} MiB per device"
        lines.append(f"  step      {which}compiled in {time.perf_counter() - start:.1f} s{text}")

    def step_of_size(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        return compiled[batch["image"].shape[1:3]](state, batch, key)

    return step if len(compiled) == 1 else step_of_size, lines


def compile_fitting_step(
    step_fn: TrainStep, state: TrainState, batch: dict, key: jax.Array, mesh: Mesh
) -> jax.stages.Compiled:
    """`compile_train_step`, with UserError if the compiler (except a CPU's) finds too little memory."""
    try:
        return compile_train_step(step_fn, state, batch, key, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        kind = mesh.devices.flat[0].device_kind
        raise UserError(f"the step does not fit into {kind} ({first_line(error)}); {LESS}") from error
