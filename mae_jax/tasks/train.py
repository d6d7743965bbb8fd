"""Trains any objective: pre-training, classification, or one of your own."""

import functools
import tempfile
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from mae_jax.interop.weights import check_workdir
from mae_jax.objectives.objective import OBJECTIVES
from mae_jax.runtime.mesh import make_mesh
from mae_jax.runtime.seeds import make_key
from mae_jax.runtime.signals import StopSignal
from mae_jax.runtime.timing import Startup
from mae_jax.training.loop import run_training
from mae_jax.training.optimizers import OPTIMIZERS, SCHEDULES
from mae_jax.training.plan import (
    compile_train_step,
    describe_chip,
    describe_cost,
    describe_plan,
    devices_for,
    make_plan,
)


def check(config: ConfigDict) -> None:
    """Raises UserError for settings that the objective, the optimizer or the schedule rejects."""
    OPTIMIZERS.find(config.optimizer.name)
    SCHEDULES.find(config.optimizer.schedule)
    OBJECTIVES.find(config.task).check(config)


def run(config: ConfigDict, workdir: Path, stop: StopSignal, startup: Startup | None = None) -> None:
    """Trains the objective of `config.task`; see `run_training`. `startup` times the phases before the first step."""
    check_workdir(workdir)
    startup = startup or Startup()
    mesh = make_mesh(config.mesh)
    with startup.phase("data"):
        objective = OBJECTIVES.find(config.task)(config, workdir, mesh)
    run_training(config, workdir, stop, objective, mesh, startup)


def dry_run(config: ConfigDict, topology: str | None) -> list[str]:
    """Describes a run and its cost, without a workdir and arrays; UserError if a step needs too much memory."""
    mesh = make_mesh(config.mesh, devices_for(topology))
    with tempfile.TemporaryDirectory() as folder:
        objective = OBJECTIVES.find(config.task)(config, Path(folder), mesh)
        plan = make_plan(config, objective, mesh)
        key, start = jax.eval_shape(functools.partial(make_key, config.seed, "train")), time.perf_counter()
        step = compile_train_step(plan.step_fn, plan.abstract, objective.batch, key, mesh)
    seconds = time.perf_counter() - start
    step_flops = objective.train_flops(objective.model.image_size) * config.data.batch_size
    lines = describe_plan(config, objective, mesh, plan)
    lines += describe_cost(step, plan.abstract, mesh, step_flops, seconds)
    return lines + describe_chip(step, mesh, config.data.batch_size)
