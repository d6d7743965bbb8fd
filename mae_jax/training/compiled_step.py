"""The training step of a run whose images grow: compiled for each size, and counted by each step's own."""

import time
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from mae_jax.data.resolutions import size_at, sizes_from
from mae_jax.objectives.objective import Trainee
from mae_jax.runtime.text import size_text
from mae_jax.training.memory import MIB, check_memory, compile_fitting_step
from mae_jax.training.plan import Plan
from mae_jax.training.state import TrainState
from mae_jax.training.step import TrainStep, memory_in_bytes


class StepOfSize:
    """Compiled steps, called as if they were one: a batch's images decide which it is."""

    def __init__(self, compiled: Mapping[tuple[int, ...], TrainStep]):
        """`compiled`: shape of a batch's images [B, H, W, C] -> step."""
        self._compiled = compiled

    def __call__(self, state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        return self._compiled[batch["image"].shape](state, batch, key)


def compile_stages(
    plan: Plan, trainee: Trainee, start_step: int, key: jax.Array, mesh: Mesh
) -> tuple[TrainStep, list[str]]:
    """Compiles the step for every size that images have from `start_step` on; a line about each says what it took.

    Raises:
      UserError: if one needs more memory than a device has.
    """
    if start_step == plan.total_steps:
        return plan.step_fn, []
    if len(plan.stages) == 1:
        compiled, line = _compile(plan, trainee.batch, key, mesh)
        return compiled, [line]
    steps, lines = {}, []
    for size in sizes_from(plan.stages, start_step):
        batch = trainee.batch | {"image": _resized(trainee.batch["image"], size)}
        steps[batch["image"].shape], line = _compile(plan, batch, key, mesh, f"of {size_text(size)} ")
        lines.append(line)
    return StepOfSize(steps), lines


def _compile(plan: Plan, batch: dict, key: jax.Array, mesh: Mesh, which: str = "") -> tuple[jax.stages.Compiled, str]:
    """Compiles the step for an abstract batch; the line tells how long that took and what memory the step needs."""
    start = time.perf_counter()
    compiled = compile_fitting_step(plan.step_fn, plan.abstract, batch, key, mesh)
    memory = memory_in_bytes(compiled)
    check_memory(memory, mesh)
    text = "" if memory is None else f", needs {memory / MIB:,.0f} MiB a device"
    return compiled, f"  step      {which}compiled in {time.perf_counter() - start:.1f} s{text}"


def make_flops_at(plan: Plan, trainee: Trainee) -> Callable[[int], int]:
    """Step -> operations of one of its images, forward and backward."""
    if len(plan.stages) == 1:
        return lambda step: trainee.train_flops
    flops = {stage.image_size: trainee.train_flops_at(stage.image_size) for stage in plan.stages}
    return lambda step: flops[size_at(plan.stages, step)]


def _resized(images: jax.ShapeDtypeStruct, size: tuple[int, int]) -> jax.ShapeDtypeStruct:
    batch_size, _, _, channels = images.shape
    return jax.ShapeDtypeStruct((batch_size, *size, channels), images.dtype)
