"""Shared by the tasks that measure a checkpoint: opening it, choosing the pictures, writing results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.data.sources import Source, describe_sources
from mae_jax.evaluation.evaluator import EvaluationData, EvaluationSuite, Trained
from mae_jax.evaluation.unseen import NO_PICTURES, PLACE, check_has_path, choose_pictures
from mae_jax.interop import weights as interop
from mae_jax.interop.foreign import is_foreign
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import all_devices, check_heads, fitting_dtype, make_mesh, parameter_shardings, put
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.settings.checks import check_channels
from mae_jax.settings.fields import defaults, flatten
from mae_jax.settings.usage import check_read
from mae_jax.workdir.history import keep_earlier_measurement
from mae_jax.workdir.metrics import write_once
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import finite_or_null, save_picture, write_json

# Settings that the command decides; the rest of `model` and `data` comes from the checkpoint.
READING = (
    "num_threads", "num_workers", "prefetch_batches", "on_bad_image", "max_pixels",
    "batch_size", "seed", "label_fraction",
)  # fmt: skip
CHOSEN = ("image_size", "dtype", "attention", "remat", "scan_unroll")
MEASURED = ("init_from", "data.name", "data.path", "data.train_split", "data.eval_split")  # repeated in a result


def open_checkpoint(
    config: ConfigDict, workdir: Path, *, needs_data: bool = True, computes: bool = True
) -> tuple[Weights, ConfigDict]:
    """Reads the weights in `config.init_from`; returns them, and the config with matching `model` and `data`.

    Pictures are the checkpoint's own or those of `data.name` and `data.path`, and are prepared as in training. The seed
    is the checkpoint's, unless set. Another `model.image_size` resizes the position table.

    Args:
      needs_data: require settings that select pictures.
      computes: the model is run, not just read.
    """
    if not config.init_from:
        raise UserError("init_from is not set: which model? For example --config.init_from=runs/digits")
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} belongs to a training run; choose another folder for what is measured")
    if computes:
        interop.check_workdir(workdir)
    path = interop.find_same_weights(config.init_from)
    weights = interop.read_weights(path, interop.assumed(config))
    changed = {group: _changed(config, group) for group in ("model", "data")}
    _check_changed(changed, weights.config, is_foreign(path))
    model = {name: value for name, value in changed["model"].items() if name in CHOSEN}
    if computes and model.get("dtype") is None:
        model["dtype"] = fitting_dtype(all_devices()[0], weights.config["model"].get("dtype"))
    weights = interop.choose(weights, model)
    for note in weights.notes:
        say(f"note: {config.init_from}: {note}")
    trained = weights.config
    groups = {"model": config.model.to_dict() | trained["model"], "data": _data(config, changed["data"], trained)}
    if is_foreign(path):
        groups["data"] |= changed["data"]
    if needs_data:
        groups["data"] |= _pictures(config.init_from, groups["data"], changed["data"], trained)
    if is_classifier(trained):
        groups["classifier"] = trained["classifier"]
    if "seed" not in config.given and config.seed == defaults().seed:
        groups["seed"] = trained["seed"]
    config = ConfigDict(config.to_dict() | groups)
    check_channels(config.data, config.model.channels)
    check_read(config)
    return weights, config


def _changed(config: ConfigDict, group: str) -> dict[str, Any]:
    """The settings of a group that differ from the defaults or are on the command line."""
    asked, usual = config[group].to_dict(), defaults()[group].to_dict()
    return {name: x for name, x in asked.items() if x != usual[name] or f"{group}.{name}" in config.given}


def _check_changed(changed: dict[str, dict], trained: dict[str, Any], foreign: bool) -> None:
    """Raises UserError for a changed setting that only the checkpoint decides."""
    # A checkpoint of 8-bit pictures has no range; other pictures may need one.
    more = () if trained["data"].get("value_range") else ("value_range",)
    allowed = {"model": CHOSEN, "data": tuple(changed["data"]) if foreign else READING + PLACE + more}
    for group, settings in changed.items():
        for name, value in settings.items():
            own = trained[group].get(name)
            if name not in allowed[group] and value != own:
                raise UserError(f"{group}.{name}={value!r} is {own!r} in the checkpoint and cannot be changed here")


def _data(config: ConfigDict, changed: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The `data.*` settings: the checkpoint's, except for those that the command decides."""
    asked, own, usual = config.data.to_dict(), trained["data"], defaults().data
    if asked["name"] is not None:
        place = {name: asked[name] for name in PLACE}
    else:
        place = {name: value for name, value in changed.items() if name in PLACE[1:] and value != usual[name]}
        if "path" in place:
            check_has_path(asked["path"], own["name"])
    value_range = own.get("value_range") or asked["value_range"]
    return asked | own | {name: asked[name] for name in READING} | place | {"value_range": value_range}


def _pictures(init_from: str, data: dict[str, Any], changed: dict[str, Any], trained: dict[str, Any]) -> dict[str, Any]:
    """The `data.*` settings that select the pictures of a folder."""
    if data["name"] is None:
        raise UserError(NO_PICTURES.format(init_from))
    if data["name"] != "image_folder":
        return {}
    # Process 0 decides, since data.path may differ between hosts.
    chosen, note = from_main(is_main() and choose_pictures(data, trained, set(changed)))
    if note:
        say(f"note: {note}")
    return chosen


def open_data(
    weights: Weights, config: ConfigDict, train: Source | None, evaluation: Source
) -> tuple[EvaluationData, Trained]:
    """The images to measure, and the checkpoint's weights on the mesh."""
    mesh = make_mesh(config.mesh)
    check_heads(mesh, MAEConfig(**config.model), decoder=interop.has_decoder(weights))
    data = EvaluationData(config, interop.make_bind_of(weights), mesh, train, evaluation)
    say(*describe_sources(config.data.name or config.data.path, data.train, data.evaluation))
    values = put(weights.params, parameter_shardings(mesh, weights.params))
    return data, Trained(weights.step, values, f"{config.init_from}, {weights.origin}")


def run_evaluators(
    names: Sequence[str], data: EvaluationData, state: Trained, workdir: Path
) -> tuple[EvaluationSuite, dict[str, Any]]:
    """Runs evaluators; writes pictures to NAME/<step>.png and returns numbers for result.json."""
    suite = EvaluationSuite(data.config, data, names)
    write_config(workdir, data.config)
    numbers, pictures = suite.run(state)
    for name, picture in pictures.items():
        save_picture(workdir / name / f"{state.step}.png", picture)
        say(f"see {workdir}/{name}/{state.step}.png")
    for name, value in numbers.items():
        if name not in ("loss", "top1", "top5"):  # the tasks print these
            say(f"{name} {value:.4f}")
    numbers = {f"eval/{name}": value for name, value in numbers.items()}
    return suite, {"step": state.step} | numbers | {"images": len(data.evaluation)}


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json. Call it after all checks of the settings."""
    write_json(workdir / "config.json", config.to_dict() | provenance())


def write_measurement(workdir: Path, config: ConfigDict, result: dict[str, Any]) -> None:
    """Writes result.json and says in it what was measured; a different earlier one is renamed with a number."""
    settings = flatten(config.to_dict())
    result = finite_or_null(result | {"measured": {key: settings[key] for key in MEASURED}})
    keep_earlier_measurement(workdir, result)
    write_json(workdir / "result.json", result)
    write_once(workdir, config.to_dict(), result["step"], result)
