"""What the tasks that measure a checkpoint have in common: the checkpoint, the pictures, and where results go."""

from pathlib import Path
from typing import Any

import ml_collections

from mae_jax.evaluation.unseen import NO_PICTURES, PLACE, check_has_path, choose_pictures
from mae_jax.interop.foreign import is_foreign
from mae_jax.interop.weights import assumed, check_workdir, choose, find_same_weights, read_weights
from mae_jax.interop.workdirs import Weights
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import all_devices, fitting_dtype
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.settings.checks import check_channels
from mae_jax.settings.fields import defaults, flatten
from mae_jax.settings.usage import check_read
from mae_jax.workdir.history import keep_earlier_measurement
from mae_jax.workdir.metrics import write_once
from mae_jax.workdir.writing import finite_or_null, write_json

# Settings that the command may decide; the others of `model` and `data` are the checkpoint's.
READING = (
    "num_threads", "num_workers", "prefetch_batches", "on_bad_image", "max_pixels",
    "batch_size", "seed", "label_fraction",
)  # fmt: skip
CHOSEN = ("image_size", "dtype", "attention", "remat", "scan_unroll")
MEASURED = ("init_from", "data.name", "data.path", "data.train_split", "data.eval_split")  # that a result tells


def open_checkpoint(
    config: ml_collections.ConfigDict, workdir: Path, *, needs_data: bool = True
) -> tuple[Weights, ml_collections.ConfigDict]:
    """Reads `config.init_from`; returns its weights, and the config with the model and the data that fit it.

    The pictures are the checkpoint's own, or those that `data.name` and its companions say; they are prepared as the
    checkpoint's were. Masks come from the checkpoint's seed, unless another one is asked for. Another
    `model.image_size` changes the table of positions.

    Raises:
      UserError: without a checkpoint, in the workdir of a training run, for a setting that would be ignored, or if
        nothing says which pictures are meant and `needs_data`.
    """
    if not config.init_from:
        raise UserError("init_from is not set: which model? For example --config.init_from=runs/digits")
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} belongs to a training run; choose another folder for what is measured")
    if config.task != "export":
        check_workdir(workdir)
    asked, usual = config.to_dict(), defaults().to_dict()
    changed = {group: _changed(asked[group], usual[group]) for group in ("model", "data")}
    for key in config.given:  # also if the value is the usual one
        group, _, name = key.partition(".")
        if group in changed and name in asked[group]:
            changed[group][name] = asked[group][name]
    path = find_same_weights(config.init_from)
    foreign = is_foreign(path)
    weights = read_weights(path, assumed(config))
    trained = weights.config
    own_range = trained["data"].get("value_range")
    range_too = () if own_range else ("value_range",)  # its own pictures had 8 bits; others may need a range
    allowed = {"model": CHOSEN, "data": tuple(usual["data"]) if foreign else READING + PLACE + range_too}
    for group, keys in allowed.items():
        for key, value in changed[group].items():
            if key not in keys and value != trained[group].get(key):
                own = trained[group].get(key)
                raise UserError(f"{group}.{key}={value!r} is {own!r} in the checkpoint and cannot be changed here")
    chosen = _only(changed["model"], CHOSEN)
    if chosen.get("dtype") is None and config.task != "export":
        chosen["dtype"] = fitting_dtype(all_devices()[0], trained["model"].get("dtype"))
    weights = choose(weights, chosen)
    trained = weights.config
    for note in weights.notes:
        say(f"note: {config.init_from}: {note}")
    given_seed = "seed" in config.given or asked["seed"] != usual["seed"]
    groups = {
        "model": asked["model"] | trained["model"],
        "data": asked["data"] | trained["data"] | _taken(asked["data"], usual["data"], trained["data"]["name"]),
        "seed": asked["seed"] if given_seed else trained["seed"],
    }
    groups["data"]["value_range"] = own_range or asked["data"]["value_range"]
    if foreign:
        groups["data"] |= changed["data"]
    if needs_data and groups["data"]["name"] is None:
        raise UserError(NO_PICTURES.format(config.init_from))
    if needs_data and groups["data"]["name"] == "image_folder":
        # Process 0 decides: data.path may differ from host to host.
        chosen, note = from_main(is_main() and choose_pictures(groups["data"], trained, set(changed["data"])))
        groups["data"] |= chosen
        if note:
            say(f"note: {note}")
    if trained["task"] == "classify":
        groups["classifier"] = trained["classifier"]
    config = ml_collections.ConfigDict(asked | groups)
    check_channels(config.data, config.model.channels)
    check_read(config, "evaluate a classifier" if (config.task, trained["task"]) == ("evaluate", "classify") else None)
    return weights, config


def write_measurement(workdir: Path, config: ml_collections.ConfigDict, result: dict[str, Any]) -> None:
    """Writes result.json, with what was measured; an earlier one with other numbers gets a number of its own."""
    settings = flatten(config.to_dict())
    measured = {key: settings[key] for key in MEASURED}
    result = finite_or_null(result | {"measured": measured})
    keep_earlier_measurement(workdir, result)
    write_json(workdir / "result.json", result)
    write_once(workdir, config.to_dict(), result["step"], result)


def _changed(asked: dict, usual: dict) -> dict[str, Any]:
    """The settings that the command has changed."""
    return {key: value for key, value in asked.items() if value != usual[key]}


def _only(settings: dict, names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in names}


def _taken(asked: dict[str, Any], usual: dict[str, Any], trained_name: str) -> dict[str, Any]:
    """The settings of the command's `data` that stand instead of the checkpoint's."""
    reading = {name: asked[name] for name in READING}
    if asked["name"] is not None:
        return reading | {name: asked[name] for name in PLACE}
    place = _only(_changed(asked | {"name": usual["name"]}, usual), PLACE)
    if "path" in place:
        check_has_path(asked["path"], trained_name)
    return reading | place
