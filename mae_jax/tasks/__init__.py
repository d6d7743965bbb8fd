"""What `config.task` names. A task is a module with `run(config, workdir, stop)`, and `startup` where it trains."""

import importlib

from mae_jax.runtime.errors import UserError
from mae_jax.settings.suggestions import nearest

TASKS = {
    "pretrain": "objectives.pretrain",
    "classify": "objectives.classify",
    **{
        name: f"tasks.{name}"
        for name in ("knn", "logistic_regression", "features", "evaluate", "reconstruct", "export")
    },
    "ablate": "tasks.ablation.program",
}
TRAINED = ("pretrain", "classify")  # the model is the settings' own; other tasks take a checkpoint's


def find_task(name: str):
    """The module of a task.

    Raises:
      UserError: for an unknown name.
    """
    if name not in TASKS:
        raise UserError(f"unknown task {name!r}{nearest(name, TASKS)} (config.task is one of: {', '.join(TASKS)})")
    return importlib.import_module(f"mae_jax.{TASKS[name]}")
