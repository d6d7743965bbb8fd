"""What a run will do, worked out from its settings before anything is made."""

import functools
from typing import NamedTuple

import jax
import ml_collections
import optax
from jax.sharding import Mesh

from mae_jax.data.resolutions import Stage, make_stages
from mae_jax.models.config import MAEConfig
from mae_jax.objectives.objective import Trainee, Variables, check_batch_size
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import batch_parts, replicated
from mae_jax.runtime.seeds import make_key
from mae_jax.settings.fields import INT32_MAX
from mae_jax.training.optimizers import fit_warmup, make_optimizer, make_schedule
from mae_jax.training.state import StateInit, TrainState, abstract_state, make_init
from mae_jax.training.step import TrainStep, make_train_step
from mae_jax.training.summary import summarize


class Plan(NamedTuple):
    """A run's steps, and the functions that make them."""

    total_steps: int
    warmup_steps: int
    schedule: optax.Schedule
    stages: tuple[Stage, ...]  # of the images' sizes
    init: StateInit
    abstract: TrainState  # shapes, types and layout of the state
    step_fn: TrainStep  # not compiled


def make_plan(config: ml_collections.ConfigDict, trainee: Trainee, mesh: Mesh) -> Plan:
    """The plan of a run on a mesh, whose devices need not be here.

    Raises:
      UserError: for a batch that the data or the mesh does not allow, or a mesh that does not divide the model.
    """
    check_batch_size(config, batch_parts(mesh), trainee)
    train, batch_size = config.train, config.data.batch_size
    steps_per_epoch = max(1, trainee.num_train // batch_size)
    total_steps = train.steps or max(1, round(train.epochs * steps_per_epoch))
    if total_steps > INT32_MAX:
        raise UserError(f"train.epochs={train.epochs} is more than {INT32_MAX:,} steps: make the run shorter")
    warmup_steps = fit_warmup(round(config.optimizer.warmup_epochs * steps_per_epoch), total_steps)
    schedule = make_schedule(config.optimizer, batch_size, warmup_steps, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule, decay_tokens=trainee.decay_tokens)
    init = make_init(trainee.init, optimizer, keep_average=train.ema_decay is not None)
    step_fn = make_train_step(
        trainee.loss_fn, optimizer, schedule, mesh, train.accumulate_steps, train.ema_decay,
        mixes_pairs=trainee.mixes_pairs, skip_nonfinite=train.skip_nonfinite,
    )  # fmt: skip
    stages = make_stages(train.resolutions, MAEConfig(**config.model).image_size, total_steps)
    return Plan(total_steps, warmup_steps, schedule, stages, init, abstract_state(init, mesh), step_fn)


def describe_plan(config: ml_collections.ConfigDict, trainee: Trainee, mesh: Mesh, plan: Plan) -> str:
    """What will run, a line each."""
    variables = Variables(plan.abstract.params, plan.abstract.frozen, plan.abstract.statistics)
    steps = {"warmup_steps": plan.warmup_steps, "total_steps": plan.total_steps}
    return summarize(config, trainee, variables, mesh, **steps, stages=plan.stages)


def make_train_key(seed: int, mesh: Mesh) -> jax.Array:
    """The key of the training steps, on every device."""
    return jax.jit(functools.partial(make_key, seed, "train"), out_shardings=replicated(mesh))()
