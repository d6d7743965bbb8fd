"""Chooses the pictures of a folder, or of rows, so that no model is evaluated on its own training pictures."""

import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.data.files import find_folder
from mae_jax.data.image_folder import ImageFolder
from mae_jax.data.sources import Source, is_labelled, make_source, match_classes, stratified_subset
from mae_jax.data.splits import find_splits
from mae_jax.evaluation.unseen_rows import SPLITTING, choose_rows
from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import from_main
from mae_jax.settings.checks import NAMES_OF
from mae_jax.settings.fields import defaults

HOLDING_OUT = NAMES_OF["data.eval_fraction"]  # data without splits, of which a share is held out
# Settings that select pictures and their labels. What values mean (dtype, value_range, mean, std) is the model's.
PLACE = (
    "name", "path", *SPLITTING, "num_examples", "root", "extensions", "image_column", "label_column", "split_column",
    "group_column", "label_kind", "label_separator",
)  # fmt: skip
NO_PICTURES = (
    "init_from={} does not say which pictures: name them, for example --config.data.name=image_folder "
    "--config.data.path=FOLDER"
)
TRAINED_ON = "some of the pictures measured were used for training"


def take_pictures(config: ConfigDict, trained: dict[str, Any]) -> None:
    """Sets the pictures to those of a checkpoint's config, except for settings on the command line.

    A different `data.path` keeps its own splits. Raises UserError if the checkpoint names no pictures, or if
    `data.path` is given for data without a path.
    """
    data, own = config.data, trained["data"]
    if own["name"] is None:
        raise UserError(NO_PICTURES.format(config.init_from))
    moved = "data.path" in config.given
    if moved:
        check_has_path(data.path, own["name"])
    others = moved and own["name"] in HOLDING_OUT and not _same_folder(own["path"], data.path)
    for name in (*PLACE, "bands", "eval_crop"):
        if f"data.{name}" not in config.given and name in own and not (others and name in SPLITTING):
            data[name] = own[name]
    if "data.flip" not in config.given:
        data.flip = data.flip and own["flip"]  # digits, text and the like must not be mirrored


def check_has_path(path: str, name: str) -> None:
    """Raises UserError if a path is given but the checkpoint's data, `name`, have none."""
    if name in ("digits", "synthetic"):
        raise UserError(
            f"data.path={path}: the checkpoint's data ({name}) have no path; "
            "name the data too, for example --config.data.name=image_folder"
        )


def keep_hold_out(config: ConfigDict, workdir: Path, trained: dict[str, Any] | None, *, resumed: bool) -> None:
    """Holds out what the run in `workdir` held out before, or `init_from` if it used the same folder.

    Raises UserError if a resumed run would be evaluated on pictures that it has learned from.
    """
    data, before = config.data, (trained or {}).get("data", {"name": None})
    if data.name != before["name"] or data.name not in HOLDING_OUT:
        return
    if resumed or from_main(_same_folder(before["path"], data.path)):  # data.path may differ between hosts
        data.stratify = data.stratify and before.get("stratify", False)
    if not resumed or data.name != "image_folder":  # of rows, `check_unchanged` sees it
        return
    splits = find_splits(find_folder(data.path), data.train_split, data.eval_split)
    if splits.evaluation:
        seen, where = _was_trained_on(splits.evaluation, before), f"in {splits.evaluation}"
    else:
        seen, where = not _were_held_out(data.to_dict(), splits.train, before), f"held out of {splits.train}"
    if seen:
        settings = ((name, data[name], before.get(name, False)) for name in SPLITTING)
        changed = ", ".join(f"data.{name}={new!r} was {old!r}" for name, new, old in settings if new != old)
        raise UserError(
            f"--workdir={workdir}: the run has learned from pictures that are now for evaluation ({where}; "
            f"{changed or 'the folders have changed'}): set the data as they were, or start in another --workdir"
        )


def choose_pictures(data: dict[str, Any], trained: dict[str, Any], given: set[str]) -> tuple[dict[str, Any], str]:
    """The `SPLITTING` settings for measuring, where the command leaves them open; and a note, perhaps empty.

    A folder's evaluation pictures are measured, or all if it has none; in the checkpoint's own training folder, the
    held-out ones. `given` names the settings `data.*` on the command line.
    """
    if data["name"] != "image_folder":
        return choose_rows(data, trained, given)
    own, usual = trained["data"], defaults().data.to_dict() | {"eval_fraction": 1.0}
    is_own = own["name"] == "image_folder" and _is_own(data["path"], trained)
    chosen = {name: data[name] for name in SPLITTING}
    for name in set(SPLITTING) - given:
        if is_own:
            chosen[name] = own.get(name, False)  # old configs lack `stratify`
        elif not name.endswith("_split") or not (Path(data["path"] or "") / data[name]).is_dir():
            chosen[name] = usual[name]  # not the names from the checkpoint's own folder
    splits = find_splits(find_folder(data["path"]), chosen["train_split"], chosen["eval_split"])
    if is_own and splits.evaluation is None:
        if not _were_held_out(data | chosen, splits.train, own):
            return chosen, TRAINED_ON
        note = f"data.path={data['path']} is, or holds as many pictures as, the folder that it was trained on"
        return chosen, f"{note}: only held-out pictures are counted" if "path" in given else ""
    if not is_own and own["name"] == "image_folder" and not os.path.isdir(own["path"]):
        return chosen, f"the folder it was trained on, {own['path']}, is not here: make sure data.path has none of it"
    return chosen, TRAINED_ON if _was_trained_on(splits.evaluation or splits.train, own) else ""


def _is_own(path: str | None, trained: dict[str, Any]) -> bool:
    """Whether a folder is the checkpoint's training folder, perhaps moved."""
    own = trained["data"]
    if not path or os.path.isdir(own["path"]):
        return _same_folder(own["path"], path)
    try:
        settings = {name: own.get(name, False) for name in SPLITTING} | {"extensions": own.get("extensions")}
        data = ConfigDict({"path": path} | settings)
        source = ImageFolder("train", data, (1, 1), 1)
        if own.get("label_fraction") is not None:
            source = stratified_subset(source, own["label_fraction"], own["seed"])
        return len(source) == trained.get("num_train_examples")
    except UserError:
        return False


def _were_held_out(data: dict[str, Any], train: Path, own: dict[str, Any]) -> bool:
    """Whether a run with settings `own` held out all that `data` holds out of the folder `train`."""
    found = _folders_of(own | {"path": data["path"]})  # the run's folder may have been moved
    alike = data["stratify"] == own.get("stratify", False) and data["eval_fraction"] <= own["eval_fraction"]
    return found == (train, None) and alike


def _was_trained_on(folder: Path, own: dict[str, Any]) -> bool:
    train, evaluation = _folders_of(own)
    folder = folder.resolve()
    if train is None or evaluation and folder.is_relative_to(evaluation.resolve()):
        return False
    return folder.is_relative_to(train.resolve()) or train.resolve().is_relative_to(folder)


def _folders_of(own: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """A run's training and evaluation folder; None, None without folders, or if they cannot be told any more."""
    if own["name"] != "image_folder" or not os.path.isdir(own["path"]):
        return None, None
    try:
        return find_splits(Path(own["path"]), own["train_split"], own["eval_split"])[:2]
    except UserError:
        return None, None


def _same_folder(one: str | None, other: str | None) -> bool:
    return bool(one and other) and os.path.realpath(one) == os.path.realpath(other)


def find_training_pictures(weights: Weights, config: ConfigDict, evaluation: Source) -> tuple[Source, Source]:
    """The checkpoint's training pictures, and the evaluation pictures with labels matched to them."""
    model, own = config.model, weights.config["data"]
    try:
        if own["name"] is None:
            raise UserError("the weights do not say what they were trained on")
        place = {name: None for name in PLACE} | {"stratify": False}  # of old configs
        data = ConfigDict(config.data.to_dict() | {name: own.get(name, usual) for name, usual in place.items()})
        train = make_source(data, "train", MAEConfig(**model).image_size, model.channels)
        if not is_labelled(train) or not train.class_names:
            raise UserError(f"the checkpoint's own training pictures ({own['name']}) have no classes")
        return train, match_classes(evaluation, train.class_names, f"the checkpoint's own data ({own['name']})")
    except UserError as error:
        raise UserError(
            f"data.path={config.data.path} has pictures to measure, but none to learn from, and {error}; set "
            "data.eval_fraction=0.1 to hold out a tenth and learn from the others, or make sub-folders train and "
            "validation"
        ) from error
