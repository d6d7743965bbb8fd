"""Weights of our own workdirs and checkpoints, and models made of them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from mae_jax.config import flatten, from_dict
from mae_jax.errors import UserError, first_line
from mae_jax.models.mae import MAEConfig, MaskedAutoencoder, make_bind


class Weights(NamedTuple):
    """A trained model at rest."""

    config: dict[str, Any]  # the resolved config of the run that trained it
    params: dict[str, Any]  # nested dict of numpy arrays
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


def read_weights(path: str | Path) -> Weights:
    """Reads config and parameters of a workdir's newest checkpoint, or of one checkpoint.

    Raises:
      UserError: if there is none, or it cannot be read.
    """
    checkpoint = find_checkpoint(path)
    try:
        about = json.loads((checkpoint / "about" / "metadata").read_text())
        handler = ocp.PyTreeCheckpointHandler()
        # As NumPy arrays, since the devices that wrote it may not be here.
        names = handler.metadata(checkpoint / "params").tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        params = handler.restore(checkpoint / "params", args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # Orbax raises many types for a damaged checkpoint
        raise UserError(f"checkpoint {checkpoint} cannot be read ({first_line(error)}); take an earlier one") from error
    return Weights(about["config"], params, about["step"])


def load(path: str | Path) -> MaskedAutoencoder:
    """A trained model from a workdir (its newest checkpoint) or one checkpoint.

    Returns:
      `model(images, key=key)` reconstructs, `model.encode(images)` gives features.

    Raises:
      UserError: if there is no readable checkpoint.
    """
    weights = read_weights(path)
    config = MAEConfig(**from_dict(weights.config)["model"])
    return make_bind(config)(jax.tree.map(jax.numpy.asarray, weights.params))


def read_fitting_params(path: str | Path, config: dict[str, Any], expected: dict) -> dict:
    """The parameters of a checkpoint, to go on from in a run with the given config.

    Args:
      expected: parameters (or their abstract shapes) that the run needs.

    Raises:
      UserError: if names or shapes differ; it names the settings in which the two models differ.
    """
    weights = read_weights(path)
    if jax.tree.map(lambda leaf: leaf.shape, weights.params) != jax.tree.map(lambda leaf: leaf.shape, expected):
        old, new = flatten(weights.config["model"]), flatten(config["model"])
        differing = ", ".join(
            f"model.{key}={old.get(key)!r} (here {new[key]!r})" for key in new if old.get(key) != new[key]
        )
        raise UserError(f"init_from={path} holds another model: {differing}; make these settings the same")
    return weights.params
