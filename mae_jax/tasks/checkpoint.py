"""What the tasks that measure a checkpoint have in common: the checkpoint, and the pictures to measure it on."""

from pathlib import Path
from typing import Any

import ml_collections

from mae_jax.errors import UserError
from mae_jax.interop.weights import Weights, read_weights
from mae_jax.training.reporting import keep_earlier_measurement

# Settings of `data` that the command decides; how pictures are prepared is the checkpoint's.
READING = ("num_threads", "num_workers", "prefetch_batches", "on_bad_image", "max_pixels", "label_fraction")
PLACE = ("name", "path", "train_split", "eval_split", "eval_fraction", "num_examples")


def open_checkpoint(config: ml_collections.ConfigDict, workdir: Path) -> tuple[Weights, ml_collections.ConfigDict]:
    """Reads `config.init_from`; returns it, and the config with the model and the data that fit it.

    The pictures are the checkpoint's own (in another place, if only `data.path` is set), or those that `data.name` and
    its companions name; they are prepared as the checkpoint's were.

    Raises:
      UserError: without a checkpoint, or in the workdir of a training run.
    """
    if not config.init_from:
        raise UserError("init_from is not set: which model? For example --config.init_from=runs/digits")
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} belongs to a training run; choose another folder for what is measured")
    weights = read_weights(config.init_from)
    keep_earlier_measurement(workdir)
    asked, trained = config.to_dict(), weights.config
    data = asked["data"] | trained["data"] | _taken(asked["data"])
    groups = {"model": asked["model"] | trained["model"], "data": data}
    if trained["task"] == "classify":
        groups["classifier"] = trained["classifier"]
    return weights, ml_collections.ConfigDict(asked | groups)


def _taken(data: dict[str, Any]) -> dict[str, Any]:
    """The settings of the command that stand instead of the checkpoint's."""
    names = READING + (PLACE if data["name"] is not None else ("path",) if data["path"] else ())
    return {name: data[name] for name in names}
