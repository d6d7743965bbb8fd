"""The tasks of `config.task`: modules with `run(config, workdir, stop)` and perhaps `dry_run`."""

import importlib
from types import ModuleType

from ml_collections import ConfigDict

from mae_jax.objectives.objective import OBJECTIVES
from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import check, check_read
from mae_jax.settings.registry import nearest

MEASURING = ("knn", "logistic_regression", "features", "evaluate", "reconstruct", "export")  # of a checkpoint
TASKS = {**dict.fromkeys(OBJECTIVES, "train"), **{name: name for name in MEASURING}, "ablate": "ablation.program"}


def trains(name: str) -> bool:
    return name in OBJECTIVES or ":" in name


def find_task(name: str) -> ModuleType:
    """The module of a task; UserError for an unknown name."""
    if not trains(name) and name not in TASKS:
        raise UserError(
            f"unknown task {name!r}{nearest(name, TASKS)} (config.task is one of: {', '.join(TASKS)}; or module:class, "
            "an objective of your own)"
        )
    return importlib.import_module(f"mae_jax.tasks.{TASKS.get(name, 'train')}")


def check_task(config: ConfigDict) -> ModuleType:
    """The module of `config.task`. UserError for settings found wrong, or unused, without data and devices."""
    check(config)
    task = find_task(config.task)
    check_read(config)
    if trains(config.task):
        task.check(config)
    return task
