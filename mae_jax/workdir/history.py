"""A workdir before a run: whether it belongs to one, and which files of an earlier run to keep."""

import json
from pathlib import Path
from typing import Any

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import only_main
from mae_jax.workdir.writing import free_name, read_object

MEASURED = ("classes.csv", "confusion_matrix.png") + tuple(
    f"{split}_{kind}.npy" for split in ("train", "eval") for kind in ("features", "labels")
)
FILES = ("config.json", "metrics.jsonl", "metrics.png", "result.json", "init_from.json", *MEASURED)
FILES += ("wandb_run.txt", "mlflow_run.txt")
ABLATIONS = ("table.md", "table.csv", "plot.png", "command.txt", "log.txt", "status.json")
FOLDERS = ("checkpoints", "checkpoints_set_aside", "reconstructions", "profile")
MAY_BE_LINKED = ("checkpoints",)  # to a larger disk


def check_folder(workdir: Path, task: str) -> None:
    """Raises UserError for links, for a file in place of a folder or vice versa, and for another program's folder."""
    if task == "export":  # it checks its folder itself
        return
    check_paths(workdir)
    if task == "ablate" or _is_ours(workdir):  # an ablation's own folder has no config.json
        return
    for path in (workdir / name for name in ("config.json", "metrics.jsonl", "metrics.png", *MEASURED)):
        if path.exists() and path.stat().st_size:
            raise UserError(
                f"--workdir={workdir} is not a run's workdir: {path.name} is another program's; choose another folder"
            )


def check_paths(workdir: Path) -> None:
    """Raises UserError if something else is at the path of a file or folder of a run."""
    for name in (*FILES, *ABLATIONS, *FOLDERS):
        path = workdir / name
        kind, right = ("folder", path.is_dir()) if name in FOLDERS else ("file", path.is_file())
        if path.is_symlink() and not (right and name in MAY_BE_LINKED):
            raise UserError(f"{path} is a link, which a run does not follow: remove it, or choose another --workdir")
        if path.exists() and not right:
            raise UserError(f"{path} is not a {kind}, as a run needs: move it away, or choose another --workdir")


def _is_ours(workdir: Path) -> bool:
    versions = (read_object(workdir / "config.json") or {}).get("versions")
    return isinstance(versions, dict) and "jax" in versions or any(workdir.glob("checkpoints/*/about/metadata"))


def check_not_beyond(workdir: Path, step: int, total_steps: int) -> None:
    """Raises UserError if the run in a workdir is already beyond the last step of this command."""
    if step > total_steps:
        raise UserError(
            f"{workdir} is at step {step} already, beyond the {total_steps} steps of this command; "
            f"raise train.steps or train.epochs, or choose another --workdir"
        )


@only_main
def keep_earlier_run(workdir: Path) -> None:
    """Renames metrics, result and pictures, but not event files, of an earlier run without checkpoints; says so."""
    for path in (workdir / name for name in ("metrics.jsonl", "metrics.png", "result.json", "reconstructions")):
        if path.exists():
            kept = path.rename(free_name(path))
            say(f"the run begins at step 0: {path} of an earlier one is kept as {kept.name}")


@only_main
def keep_earlier_result(workdir: Path, step: int) -> None:
    """Renames the result of a shorter run, which goes on from `step`, to result.<step>.json (or with a number)."""
    if (result := workdir / "result.json").exists():
        result.rename(free_name(workdir / f"result.{step}.json"))


@only_main
def keep_earlier_measurement(workdir: Path, new: dict[str, Any]) -> None:
    """Renames an earlier, different result to result.1.json, or the next free number."""
    result = workdir / "result.json"
    if result.exists() and read_object(result) != json.loads(json.dumps(new)):
        result.rename(free_name(result))
