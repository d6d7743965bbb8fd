"""What the tasks that measure a checkpoint have in common: the checkpoint, the pictures, and where results go."""

from pathlib import Path
from typing import Any

import ml_collections

from configs import common
from mae_jax.config import flatten
from mae_jax.errors import UserError
from mae_jax.interop.weights import Weights, read_weights
from mae_jax.training.reporting import keep_earlier_measurement, write_json

# Settings that the command may decide; the others of `model` and `data` are the checkpoint's.
READING = (
    "num_threads", "num_workers", "prefetch_batches", "on_bad_image", "max_pixels",
    "batch_size", "seed", "label_fraction",
)  # fmt: skip
PLACE = ("name", "path", "train_split", "eval_split", "eval_fraction", "num_examples")
COMPUTE = ("dtype", "remat", "scan_unroll")


def open_checkpoint(config: ml_collections.ConfigDict, workdir: Path) -> tuple[Weights, ml_collections.ConfigDict]:
    """Reads `config.init_from`; returns its weights, and the config with the model and the data that fit it.

    The pictures are the checkpoint's own, or those that `data.name` and its companions say; they are prepared as the
    checkpoint's were. Masks come from the checkpoint's seed, unless another one is asked for.

    Raises:
      UserError: without a checkpoint, in the workdir of a training run, or for a setting that would be ignored.
    """
    if not config.init_from:
        raise UserError("init_from is not set: which model? For example --config.init_from=runs/digits")
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} belongs to a training run; choose another folder for what is measured")
    asked, usual = config.to_dict(), common.get_config().to_dict()
    weights = read_weights(config.init_from)
    trained = weights.config
    groups = {
        "model": asked["model"] | trained["model"] | _changed(asked["model"], usual["model"], COMPUTE),
        "data": asked["data"] | trained["data"] | _taken(asked["data"], usual["data"], trained["data"]["name"]),
        "seed": trained["seed"] if asked["seed"] == usual["seed"] else asked["seed"],
    }
    for group, allowed in (("model", COMPUTE), ("data", READING + PLACE)):
        for key, value in _changed(asked[group], usual[group]).items():
            if key not in allowed and value != trained[group].get(key):
                own = trained[group].get(key)
                raise UserError(f"{group}.{key}={value!r} is {own!r} in the checkpoint and cannot be changed here")
    if trained["task"] == "classify":
        groups["classifier"] = trained["classifier"]
    weights = weights._replace(config=trained | {"model": groups["model"]})
    return weights, ml_collections.ConfigDict(asked | groups)


def write_measurement(workdir: Path, config: ml_collections.ConfigDict, result: dict[str, Any]) -> None:
    """Writes result.json, with what was measured; an earlier one with other numbers gets a number of its own."""
    of = {key: flatten(config.to_dict())[key] for key in ("init_from", *(f"data.{name}" for name in PLACE[:4]))}
    result = result | {"measured": of}
    keep_earlier_measurement(workdir, result)
    write_json(workdir / "result.json", result)


def _changed(asked: dict, usual: dict, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The settings that the command has changed."""
    return {key: value for key, value in asked.items() if value != usual[key] and (names is None or key in names)}


def _taken(asked: dict[str, Any], usual: dict[str, Any], trained_name: str) -> dict[str, Any]:
    """The settings of the command's `data` that stand instead of the checkpoint's."""
    reading = {name: asked[name] for name in READING}
    if asked["name"] is not None:
        return reading | {name: asked[name] for name in PLACE}
    place = _changed(asked | {"name": usual["name"]}, usual, PLACE)
    if "path" in place and trained_name in ("digits", "synthetic"):
        raise UserError(
            f"data.path={asked['path']}: the checkpoint's data ({trained_name}) have no path; "
            "name the data too, for example --config.data.name=image_folder"
        )
    return reading | place
