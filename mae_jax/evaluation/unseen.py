"""Chooses the pictures of an image folder so that no model is evaluated on its own training pictures."""

import contextlib
import os
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mae_jax.data.files import find_folder
from mae_jax.data.image_folder import ImageFolder
from mae_jax.data.sources import Source, StratifiedSubset, make_source, match_classes
from mae_jax.data.splits import find_splits
from mae_jax.interop.foreign import is_foreign
from mae_jax.interop.hub import is_hub
from mae_jax.interop.workdirs import Weights, find_checkpoint, read_config, read_own_config
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import from_main
from mae_jax.settings.fields import defaults

SPLITTING = ("train_split", "eval_split", "eval_fraction", "stratify")
PLACE = ("name", "path", *SPLITTING, "num_examples")  # settings that select pictures
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
    others = moved and own["name"] == "image_folder" and not _same_folder(own["path"], data.path)
    for name in (*PLACE, "eval_crop"):
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


def keep_hold_out(config: ConfigDict, workdir: Path) -> None:
    """Holds out what the run in `workdir` held out before, or `init_from` if it used the same folder.

    Checkpoints without `data.stratify` come from a version that held out a share of all pictures, not of each class.
    Raises UserError if the run would continue with evaluation on pictures it has learned from.
    """
    if config.data.name != "image_folder":
        return
    before, own = None, None
    with contextlib.suppress(UserError):  # an unreadable checkpoint is reported where it is needed
        before = own = read_own_config(workdir)
        start = Path(config.init_from or "").expanduser()
        if not own and config.init_from and not is_hub(config.init_from) and not is_foreign(start):
            before = read_config(find_checkpoint(start))[0]
    if not before or before["data"]["name"] != "image_folder":
        return
    if own or from_main(_same_folder(before["data"]["path"], config.data.path)):  # data.path may differ between hosts
        config.data.stratify = config.data.stratify and before["data"].get("stratify", False)
    if own:
        _check_not_seen(config.data, own["data"], workdir)


def _check_not_seen(data: ConfigDict, before: dict[str, Any], workdir: Path) -> None:
    splits = find_splits(find_folder(data.path), data.train_split, data.eval_split)
    remedy = "set the data as they were, or start in another --workdir"
    if splits.evaluation and _was_trained_on(splits.evaluation, before):
        raise UserError(
            f"--workdir={workdir}: the run has learned from pictures in {splits.evaluation}, which are now for "
            f"evaluation (data.train_split='' and data.eval_split='' take sub-folders for classes): {remedy}"
        )
    if not splits.evaluation and not _were_held_out(data.to_dict(), splits.train, before):
        settings = ((name, data[name], before.get(name, False)) for name in SPLITTING)
        changed = ", ".join(f"data.{name}={new!r} was {old!r}" for name, new, old in settings if new != old)
        raise UserError(
            f"--workdir={workdir}: the run has learned from pictures that would now be held out of {splits.train}"
            f"{f' ({changed})' if changed else ''}: {remedy}"
        )


def choose_pictures(data: dict[str, Any], trained: dict[str, Any], given: set[str]) -> tuple[dict[str, Any], str]:
    """Chooses which pictures of an image folder to measure, where the command leaves it open.

    These are the folder's evaluation pictures, or all if it has none; in the checkpoint's own training folder, the
    held-out ones. Takes the settings `data.*` and the names of those on the command line; returns the `SPLITTING`
    settings and a note for the user, perhaps empty. Raises UserError for a missing folder or unclear splits.
    """
    own, usual = trained["data"], defaults().data
    is_own = own["name"] == "image_folder" and _is_own(data["path"], trained)
    chosen = {name: data[name] for name in SPLITTING}
    for name in set(SPLITTING) - given:
        if is_own:
            chosen[name] = own.get(name, False)  # old configs lack `stratify`
        elif name == "eval_fraction":
            chosen[name] = 1.0
        elif name == "stratify" or not (Path(data["path"] or "") / data[name]).is_dir():
            chosen[name] = usual[name]  # not the names from the checkpoint's own folder
    splits = find_splits(find_folder(data["path"]), chosen["train_split"], chosen["eval_split"])
    if is_own and splits.evaluation is None:
        if not _were_held_out(data | chosen, splits.train, own):
            return chosen, TRAINED_ON
        if "path" not in given:
            return chosen, ""
        known = "is the folder" if _same_folder(own["path"], data["path"]) else "holds as many pictures as the folder"
        return chosen, f"data.path={data['path']} {known} that it was trained on: only held-out pictures are counted"
    if not is_own and own["name"] == "image_folder" and not os.path.isdir(own["path"]):
        return chosen, f"the folder it was trained on, {own['path']}, is not here: make sure data.path has none of it"
    return chosen, TRAINED_ON if _was_trained_on(splits.evaluation or splits.train, own) else ""


def _is_own(path: str | None, trained: dict[str, Any]) -> bool:
    """Whether a folder is the checkpoint's training folder, perhaps moved."""
    own = trained["data"]
    if not path or os.path.isdir(own["path"]):
        return _same_folder(own["path"], path)
    try:
        data = ConfigDict({"path": path} | {name: own.get(name, False) for name in SPLITTING})
        source = ImageFolder("train", data, (1, 1), 1)
        if own.get("label_fraction") is not None:
            source = StratifiedSubset(source, own["label_fraction"], own["seed"])
        return len(source) == trained.get("num_train_examples")
    except UserError:
        return False


def _were_held_out(data: dict[str, Any], train: Path, own: dict[str, Any]) -> bool:
    """Whether a run with settings `own` held out all that `data` holds out of the folder `train`."""
    try:
        folders = _folders_of(own | {"path": data["path"]})  # the run's folder may have been moved
    except UserError:
        return False
    alike = data["stratify"] == own.get("stratify", False) and data["eval_fraction"] <= own["eval_fraction"]
    return folders == (train, None) and alike


def _was_trained_on(folder: Path, own: dict[str, Any]) -> bool:
    """Whether a run with settings `own` learned from pictures in a folder."""
    if own["name"] != "image_folder" or not os.path.isdir(own["path"]):
        return False
    try:
        train, evaluation = (path and path.resolve() for path in _folders_of(own))
    except UserError:
        return False
    folder = folder.resolve()
    if evaluation and folder.is_relative_to(evaluation):
        return False
    return folder.is_relative_to(train) or train.is_relative_to(folder)


def _folders_of(own: dict[str, Any]) -> tuple[Path, Path | None]:
    """A run's training folder and evaluation folder."""
    root = Path(own["path"])
    if "stratify" in own:
        return find_splits(root, own["train_split"], own["eval_split"])[:2]
    # Versions before that setting knew only these names.
    train = root / own["train_split"]
    names = (own["eval_split"], "val", "validation", "test")
    return train if train.is_dir() else root, next((root / n for n in names if n and (root / n).is_dir()), None)


def _same_folder(one: str | None, other: str | None) -> bool:
    return bool(one and other) and os.path.realpath(one) == os.path.realpath(other)


def find_training_pictures(weights: Weights, config: ConfigDict, evaluation: Source) -> tuple[Source, Source]:
    """The checkpoint's training pictures, and the evaluation pictures with labels matched to them."""
    model, own = config.model, weights.config["data"]
    try:
        if own["name"] is None:
            raise UserError("the weights do not say what they were trained on")
        data = ConfigDict(config.data.to_dict() | {name: own.get(name, False) for name in PLACE})
        train = make_source(data, "train", MAEConfig(**model).image_size, model.channels)
        if train.num_classes < 2 or not train.class_names:
            raise UserError(f"the checkpoint's own training pictures ({own['name']}) have no classes")
        return train, match_classes(evaluation, train.class_names, f"the checkpoint's own data ({own['name']})")
    except UserError as error:
        raise UserError(
            f"data.path={config.data.path} has pictures to measure, but none to learn from, and {error}; set "
            "data.eval_fraction=0.1 to hold out a tenth and learn from the others, or make sub-folders train and "
            "validation"
        ) from error
