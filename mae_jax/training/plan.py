"""Plans a run from its settings, before any array is created, and describes the plan."""

import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.resolutions import Stage, make_stages
from mae_jax.data.sources import describe_sources
from mae_jax.objectives.objective import Objective, Variables
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import replicated
from mae_jax.runtime.seeds import make_key
from mae_jax.runtime.text import si, size_text
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
            f"{size_text(stage.image_size)} up to step {end:,} "
            f"({si(objective.train_flops(stage.image_size))}FLOP an image)"
            for stage, end in zip(plan.stages, ends, strict=True)
        )
    peak = peak_learning_rate(optimizer, data.batch_size)
    rate = f"peak rate {peak:.3g}, warm-up {plan.warmup_steps:,} steps, then {optimizer.schedule}"
    rows["schedule"] = f"{optimizer.name}, {rate}"
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    processes = f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}"
    rows["mesh"] = f"{axes} ({len(devices)} x {devices[0].device_kind}, {processes})"
    return "\n".join(f"  {name:<9} " + text.replace("\n", f"\n{'':12}") for name, text in rows.items()).split("\n")


def make_train_key(seed: int, mesh: Mesh) -> jax.Array:
    """The key of the training steps, on every device."""
    return jax.jit(functools.partial(make_key, seed, "train"), out_shardings=replicated(mesh))()
