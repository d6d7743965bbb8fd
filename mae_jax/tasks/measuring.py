"""Shared by the tasks that measure a checkpoint: opening it, choosing the pictures, writing results."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.data.depth import settle_depth
from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.sources import (
    Labelled,
    Source,
    describe_sources,
    make_source,
    make_sources,
    match_classes,
    stratified_subset,
)
from mae_jax.data.statistics import take_statistics
from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.unseen import (
    HOLDING_OUT,
    NO_PICTURES,
    PLACE,
    check_has_path,
    choose_pictures,
    find_training_pictures,
)
from mae_jax.interop import weights as interop
from mae_jax.interop.foreign import is_foreign
from mae_jax.interop.transfer import OWN_MODEL_SETTINGS
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.mesh import all_devices, check_heads, fit_to_chip, make_mesh, parameter_shardings, put
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.settings.checks import check_channels, check_read
from mae_jax.settings.fields import defaults, flatten
from mae_jax.workdir.folder import keep_earlier_measurement
from mae_jax.workdir.metrics import write_once
from mae_jax.workdir.writing import finite_or_null, write_json

# Settings of `data` that the command decides, as it does OWN_MODEL_SETTINGS; the rest comes from the checkpoint.
READING = (
    "num_threads", "num_workers", "prefetch_batches", "on_bad_image", "max_pixels",
    "batch_size", "seed", "label_fraction",
)  # fmt: skip
MEASURED = ("init_from", "data.name", "data.path", "data.train_split", "data.eval_split")  # repeated in a result


def open_checkpoint(
    config: ConfigDict, workdir: Path, *, needs_data: bool = True, computes: bool = True
) -> tuple[Weights, ConfigDict]:
    """Reads the weights in `config.init_from`; returns them, and the config with matching `model` and `data`.

    Pictures are the checkpoint's own or those of `data.name` and `data.path`, prepared as in training. The seed is the
    checkpoint's, unless set. `computes`: the model is run, not just read.
    """
    if not config.init_from:
        raise UserError("init_from is not set: which model? For example --config.init_from=runs/digits")
    if (workdir / "checkpoints").exists():
        raise UserError(f"--workdir={workdir} belongs to a training run; choose another folder for what is measured")
    if computes:
        interop.check_workdir(workdir)
    path = interop.find_same_weights(config.init_from)
    weights, foreign = interop.read_weights(path, config.assume), is_foreign(path)
    changed = {group: _changed(config, group) for group in ("model", "data")}
    # A checkpoint of 8-bit pictures has no range; deeper ones may need it.
    more = ("bands", "dtype") if weights.config["data"].get("value_range") else ("bands", "dtype", "value_range")
    allowed = {"model": OWN_MODEL_SETTINGS, "data": changed["data"] if foreign else READING + PLACE + more}
    for group, settings in changed.items():
        for name, value in settings.items():
            own = weights.config[group].get(name)
            if name not in allowed[group] and value != own:
                raise UserError(f"{group}.{name}={value!r} is {own!r} in the checkpoint and cannot be changed here")
    model = {name: value for name, value in changed["model"].items() if name in OWN_MODEL_SETTINGS}
    if not computes:  # how a chip computes says nothing here
        model = {name: value for name, value in model.items() if name == "image_size"}
    else:
        fit_to_chip(model, all_devices()[0], weights.config["model"])
    weights = interop.choose(weights, model)
    for note in weights.notes:
        say(f"note: {config.init_from}: {note}")
    trained = weights.config
    data = _data(config, trained["data"]) | (changed["data"] if foreign else {})
    if needs_data and data["name"] is None:
        raise UserError(NO_PICTURES.format(config.init_from))
    if needs_data and data["name"] in HOLDING_OUT:
        # Process 0 decides, since data.path may differ between hosts.
        chosen, note = from_main(is_main() and choose_pictures(data, trained, set(changed["data"])))
        data |= chosen
        if note:
            say(f"note: {note}")
    groups = {"model": config.model.to_dict() | trained["model"], "data": data}
    if is_classifier(trained):
        groups["classifier"] = trained["classifier"]
    if "seed" not in config.given and config.seed == defaults().seed:
        groups["seed"] = trained["seed"]
    config = ConfigDict(config.to_dict() | groups)
    if foreign and config.data.statistics:
        take_statistics(config)
    check_channels(config.data, config.model.channels)
    check_read(config)
    return weights, config


def _changed(config: ConfigDict, group: str) -> dict[str, Any]:
    """The settings of a group that differ from the defaults or are on the command line."""
    asked, usual = config[group].to_dict(), defaults()[group].to_dict()
    return {name: x for name, x in asked.items() if x != usual[name] or f"{group}.{name}" in config.given}


def _data(config: ConfigDict, own: dict[str, Any]) -> dict[str, Any]:
    """The settings `data.*`: the checkpoint's `own`, except for those that the command decides."""
    asked, usual = config.data.to_dict(), defaults().data
    place = list(PLACE) if asked["name"] is not None else [name for name in PLACE[1:] if asked[name] != usual[name]]
    place += [name for name in ("bands", "dtype") if asked[name] is not None]
    if asked["name"] is None and "path" in place:
        check_has_path(asked["path"], own["name"])
    deeper = ("value_range", "dtype") if asked["value_range"] and not own.get("value_range") else ()
    return asked | own | {name: asked[name] for name in (*READING, *place, *deeper)}


def check_has_decoder(weights: Weights, init_from: str) -> None:
    """Raises UserError if nothing can be reconstructed."""
    if "decoder" not in weights.params:
        raise UserError(
            f"init_from={init_from} holds only an encoder: nothing can be reconstructed; give a file with its decoder "
            "(of the released ones mae_pretrain_vit_*_full or mae_visualize_vit_*)"
        )


def find_sources(
    weights: Weights, config: ConfigDict, *, to_train: bool = True, labelled: bool = False
) -> tuple[Source | None, Source]:
    """Training images, if there are any, and evaluation images. `labelled`: both must be there and have labels."""
    data, size, channels = config.data, MAEConfig(**config.model).image_size, config.model.channels
    if not to_train:
        return None, make_source(data, "eval", size, channels)
    try:
        train, evaluation = make_sources(data, size, channels)
    except NothingToTrainOn:
        train, evaluation = None, make_source(data, "eval", size, channels)
        if labelled:
            train, evaluation = find_training_pictures(weights, config, evaluation)
            say("note: the training images are those of the checkpoint's own data")
        elif data.label_fraction is not None:
            raise UserError(
                f"data.label_fraction={data.label_fraction} takes a share of the pictures to learn from, and "
                f"data.path={data.path} has none: leave it out"
            ) from None
        elif (names := weights.config.get("class_names")) and weights.config["data"]["name"]:
            evaluation = match_classes(evaluation, list(names), config.init_from)
    if labelled:
        train, evaluation = Labelled(train, data), Labelled(evaluation, data)
    if data.label_fraction is not None:
        train = stratified_subset(train, data.label_fraction, data.seed)
    return train, evaluation


def match_to_classifier(source: Source, weights: Weights, config: ConfigDict) -> tuple[Source, list[str]]:
    """The source with the classifier's labels, by name or else by order, and a name for each of its classes."""
    num_classes, known, found = config.classifier.num_classes, weights.config.get("class_names"), source.class_names
    foreign, kind = weights.config["data"]["name"] is None, weights.config.get("label_kind", "class")
    if source.num_classes and source.label_kind != kind:
        raise UserError(
            f"{config.init_from} has learned labels of the kind {kind}, but data.name={config.data.name} has labels of "
            f"the kind {source.label_kind}: choose data with labels of the kind {kind} (data.label_kind)"
        )
    if known and found and not (foreign and set(known).isdisjoint(found)):
        source = match_classes(source, list(known), str(config.init_from))
    elif source.num_classes > num_classes or (foreign and known and found and source.num_classes < num_classes):
        raise UserError(
            f"{config.init_from} has {num_classes} classes, but data.name={config.data.name} has "
            f"{source.num_classes}; choose data with the same classes"
        )
    elif foreign and found:
        if known or source.num_classes < num_classes:
            say(f"note: the classes of the data ({found[0]}, ...) are matched by their order to {config.init_from}'s")
        known = None
    names = [escaped(name) for name in known or found or ()]
    return source, names + [f"class {label}" for label in range(len(names), num_classes)]


def open_data(
    weights: Weights,
    config: ConfigDict,
    train: Source | None,
    evaluation: Source,
    describe: Callable[[Source, Source], Sequence[str]] | None = None,
) -> tuple[EvaluationData, Trained]:
    """The images to measure, and the checkpoint's weights on the mesh.

    `describe` makes lines for users of both sources; None: so many images for training and for evaluation.
    """
    settle_depth(config.data, (train, evaluation), config.model.channels)
    mesh = make_mesh(config.mesh)
    check_heads(mesh, MAEConfig(**config.model), decoder="decoder" in weights.params)
    data = EvaluationData(config, interop.make_bind_of(weights), mesh, train, evaluation)
    if describe is None:
        describe = functools.partial(describe_sources, config.data.name or config.data.path)
    say(*describe(data.train, data.evaluation))
    values = put(weights.params, parameter_shardings(mesh, weights.params))
    return data, Trained(weights.step, values, f"{config.init_from}, {weights.origin}")


def write_measurement(workdir: Path, config: ConfigDict, result: dict[str, Any]) -> None:
    """Writes result.json and says in it what was measured; a different earlier one is renamed with a number."""
    settings = flatten(config.to_dict())
    result = finite_or_null(result | {"measured": {key: settings[key] for key in MEASURED}})
    keep_earlier_measurement(workdir, result)
    write_json(workdir / "result.json", result)
    write_once(workdir, config.to_dict(), result["step"], result)
