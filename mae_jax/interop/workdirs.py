"""Reads models from our own workdirs and checkpoints."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.models.parameters import join
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.settings.fields import from_dict
from mae_jax.workdir.checkpoints import find_damage

ITEMS = ("frozen", "params", "average", "statistics")  # parts of a checkpoint that make up a model


class Weights(NamedTuple):
    """A trained model at rest."""

    # The training run's resolved config; for another program's file: task, model, classifier, data.
    config: dict[str, Any]
    # Nested dict of NumPy arrays (the moving average if there is one); no decoder if the file has none.
    params: dict[str, Any]
    step: int  # updates that made them; 0 if the file does not say
    origin: str  # for people
    notes: tuple[str, ...] = ()  # what was left over, missing or had to be assumed


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or a workdir's newest complete one. UserError if none."""
    path = Path(path).absolute()
    if (path / "params").is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if steps := _steps(folder):
        return folder / str(steps[-1])
    fault = "is neither a workdir with a checkpoint nor a checkpoint" if path.exists() else "does not exist"
    remedy = "give a workdir such as runs/digits, runs/digits/checkpoints/STEP, or a file or folder of weights"
    raise UserError(f"{path} {fault}; {remedy}")


def _steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, which Orbax has renamed to their bare numbers."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def read_own_config(workdir: Path) -> dict[str, Any] | None:
    """The newest undamaged checkpoint's config, for all processes; None without any."""
    folder, config = workdir / "checkpoints", None
    for step in reversed(_steps(folder) if is_main() else []):
        with contextlib.suppress(UserError):  # the run sets a bad one aside, and says so
            _check_undamaged(folder / str(step), "about")
            config = read_config(folder / str(step))[0]
            break
    return from_dict(config) if (config := from_main(config)) else None


def _check_undamaged(checkpoint: Path, *parts: str) -> None:
    if damage := find_damage(checkpoint, parts):
        raise UserError(f"checkpoint {checkpoint} is damaged: {damage}; take {_another(checkpoint)}")


def _another(checkpoint: Path) -> str:
    """The checkpoint before a bad one, or what to do if there is none."""
    steps = _steps(checkpoint.parent) if checkpoint.name.isdecimal() else []
    earlier = [step for step in steps if step < int(checkpoint.name)]
    return f"an earlier one, such as {checkpoint.parent}/{earlier[-1]}" if earlier else "another one, or a copy of it"


def read_config(checkpoint: Path) -> tuple[dict[str, Any], int]:
    """A checkpoint's config, with tuples restored, and step. UserError if unreadable or in another step's folder."""
    try:
        about = json.loads((checkpoint / "about" / "metadata").read_text())
        config, step = from_dict(about["config"]), about["step"]
        if type(step) is not int:
            raise ValueError(f"its step is {step!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {checkpoint} cannot be read ({first_line(error)}); take an earlier one") from error
    if checkpoint.name.isdecimal() and checkpoint.name != str(step):
        raise UserError(f"checkpoint {checkpoint} belongs to step {step}: rename its folder to {step}, or move it away")
    return config, step


def read_workdir(path: str | Path) -> Weights:
    """Config and parameters of a workdir's newest checkpoint, or of one checkpoint; UserError if it is unusable."""
    checkpoint = find_checkpoint(path)
    _check_undamaged(checkpoint, "about", *ITEMS)  # not the optimizer's state, which is most of a checkpoint
    config, step = read_config(checkpoint)
    trees = {name: _read_tree(checkpoint / name) for name in ITEMS if (checkpoint / name).is_dir()}
    if "average" in trees:
        del trees["params"]
    params = join(*trees.values())
    if "encoder" not in params:
        raise UserError(f"checkpoint {checkpoint} holds no encoder, only {', '.join(params) or 'nothing'}")
    flat = flatten_dict(params)
    for names, leaf in flat.items():
        if not np.isfinite(leaf).all():
            remedy = f"its training had failed; take {_another(checkpoint)}"
            raise UserError(f"checkpoint {checkpoint}: {'/'.join(names)} holds NaN or infinity; {remedy}")
        if names[-2:] == ("qkv", "kernel") and leaf.ndim == 3 or names[-2:] == ("qkv", "bias") and leaf.ndim == 2:
            flat[names] = leaf.reshape(*leaf.shape[:-1], 3, -1)  # an earlier version concatenated them
    return Weights(config, unflatten_dict(flat), step, f"step {step:,} ({config['task']})")


def _read_tree(folder: Path) -> dict[str, Any]:
    try:
        handler = ocp.PyTreeCheckpointHandler()
        # As NumPy arrays, since the devices that wrote it may be absent.
        names = handler.metadata(folder).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # Orbax raises many types for a damaged checkpoint
        text = f"checkpoint {folder.parent} cannot be read ({first_line(error)}); take an earlier one"
        raise UserError(text) from error
