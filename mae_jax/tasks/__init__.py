"""The tasks of `config.task`: modules with `run(config, workdir, stop)` and perhaps `dry_run`."""

import importlib
from types import ModuleType

from ml_collections import ConfigDict

from mae_jax.objectives.objective import OBJECTIVES
from mae_jax.settings.checks import check, check_read

# Name -> module.
TASKS = dict.fromkeys(OBJECTIVES, "train") | dict.fromkeys(
    ("knn", "logistic_regression", "few_shot", "probe_sweep"), "frozen"
)
TASKS |= {"ablate": "ablation.program", "demo": "demo.program"}
TASKS |= {
    name: name
    for name in ("evaluate", "reconstruct", "export", "prepare", "inspect", "predict", "features", "retrieve")
}


def trains(name: str) -> bool:
    return name in OBJECTIVES or ":" in name


def check_task(config: ConfigDict) -> ModuleType:
    """The module of `config.task`. UserError for settings found wrong, or unused, without data and devices."""
    check(config)
    check_read(config)
    task = importlib.import_module(f"mae_jax.tasks.{TASKS.get(config.task, 'train')}")
    if trains(config.task):
        task.check(config)
    return task
