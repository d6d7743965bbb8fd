"""Weights of our own workdirs and checkpoints, and models made of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mae_jax.config import flatten, from_dict
from mae_jax.errors import UserError, first_line
from mae_jax.models.classifier import Classifier, make_bind_classifier, make_classifier_config
from mae_jax.models.mae import MAEConfig, MaskedAutoencoder, make_bind
from mae_jax.models.parameters import join

ITEMS = ("frozen", "params", "average", "statistics")  # of a checkpoint, that make up a model


class Weights(NamedTuple):
    """A trained model at rest."""

    config: dict[str, Any]  # the resolved config of the run that trained it
    params: dict[str, Any]  # nested dict of numpy arrays: all that the model needs; the moving average if there is one
    step: int  # updates that made them


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest complete one of a workdir.

    Raises:
      UserError: if there is none.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise UserError(f"{path} does not exist; give a workdir such as runs/digits, or runs/digits/checkpoints/STEP")
    if (path / "params").is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    # Orbax renames a checkpoint to its bare number when it is complete.
    steps = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise UserError(f"{path} is neither a workdir with a checkpoint nor a checkpoint of mae_jax")
    return folder / str(max(steps))


def has_checkpoint(workdir: Path) -> bool:
    """Whether a workdir has a complete checkpoint."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(entry.name.isdigit() for entry in folder.iterdir())


def pin_checkpoint(init_from: str, workdir: Path) -> Path:
    """The checkpoint that a run begins with, the same when it is started again before its own first checkpoint.

    (The run in `init_from` may have gone on in between.) It is noted in the workdir's init_from.json.
    """
    note = workdir / "init_from.json"
    if note.exists() and (workdir / "config.json").exists():  # without it, that run was refused before it began
        noted = json.loads(note.read_text())
        if noted["init_from"] == init_from and Path(noted["checkpoint"]).is_dir():
            return Path(noted["checkpoint"])
    checkpoint = find_checkpoint(init_from)
    temporary = note.with_name(note.name + ".tmp")
    temporary.write_text(json.dumps({"init_from": init_from, "checkpoint": str(checkpoint)}) + "\n")
    temporary.replace(note)
    return checkpoint


def read_config(checkpoint: Path) -> tuple[dict[str, Any], int]:
    """The resolved config of the run that wrote a checkpoint, with tuples as they were, and the checkpoint's step.

    Raises:
      UserError: if it cannot be read.
    """
    try:
        about = json.loads((checkpoint / "about" / "metadata").read_text())
        return from_dict(about["config"]), about["step"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {checkpoint} cannot be read ({first_line(error)}); take an earlier one") from error


def read_weights(path: str | Path) -> Weights:
    """Reads config and parameters of a workdir's newest checkpoint, or of one checkpoint.

    Raises:
      UserError: if there is none, it cannot be read, or it holds no encoder.
    """
    checkpoint = find_checkpoint(path)
    config, step = read_config(checkpoint)
    trees = {name: _read_tree(checkpoint / name) for name in ITEMS if (checkpoint / name).is_dir()}
    if "average" in trees:
        del trees["params"]
    params = join(*trees.values())
    if "encoder" not in params:
        raise UserError(f"checkpoint {checkpoint} holds no encoder, only {', '.join(params) or 'nothing'}")
    return Weights(config, params, step)


def _read_tree(folder: Path) -> dict[str, Any]:
    try:
        handler = ocp.PyTreeCheckpointHandler()
        # As NumPy arrays, since the devices that wrote it may not be here.
        names = handler.metadata(folder).tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # Orbax raises many types for a damaged checkpoint
        raise UserError(
            f"checkpoint {folder.parent} cannot be read ({first_line(error)}); take an earlier one"
        ) from error


def make_bind_of(config: dict[str, Any]) -> Callable[[dict], MaskedAutoencoder | Classifier]:
    """The pure function from variables to a model of the kind that a run with this config trains."""
    if config["task"] == "classify":
        return make_bind_classifier(make_classifier_config(config["model"], config["classifier"]))
    return make_bind(MAEConfig(**config["model"]))


def load(path: str | Path) -> MaskedAutoencoder | Classifier:
    """A trained model from a workdir (its newest checkpoint) or one checkpoint.

    Returns:
      An autoencoder: `model(images, key=key)` reconstructs; or, from classify, a classifier: `model(images)` gives
      logits. `model.encode(images)` gives the features of both.

    Raises:
      UserError: if there is no readable checkpoint.
    """
    weights = read_weights(path)
    return make_bind_of(weights.config)(jax.tree.map(jax.numpy.asarray, weights.params))


def read_fitting_params(path: str | Path, config: dict[str, Any], expected: dict) -> dict:
    """The parameters of a checkpoint, to go on from in a run with the given config.

    Args:
      expected: parameters (or their abstract shapes) that the run needs.

    Raises:
      UserError: if names or shapes differ; it names the settings in which the two models differ.
    """
    weights = read_weights(path)
    if weights.config["task"] == "classify":
        raise UserError(f"init_from={path} is a classifier without a decoder; pre-training needs an autoencoder")
    if jax.tree.map(lambda leaf: leaf.shape, weights.params) != jax.tree.map(lambda leaf: leaf.shape, expected):
        old, new = flatten(weights.config["model"]), flatten(config["model"])
        differing = ", ".join(
            f"model.{key}={old.get(key)!r} (here {new[key]!r})" for key in new if old.get(key) != new[key]
        )
        raise UserError(f"init_from={path} holds another model: {differing}; make these settings the same")
    return weights.params
