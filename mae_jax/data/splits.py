"""Which sub-folders of an image folder are for training and for evaluation."""

import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

from mae_jax.data.listing import first_few, folders_of, holds_pictures, list_pictures, sub_folders
from mae_jax.runtime.errors import UserError

# Names that people give to these folders, in any case.
TRAIN = ("train", "training")
VALIDATION = ("validation", "val", "valid", "eval")
TEST = ("test", "testing")
MOST = 20  # splits that people make; more folders that look alike are classes
USUAL = {"data.train_split": "train", "data.eval_split": "validation"}  # the settings if nobody has set them


class Splits(NamedTuple):
    """The folders of an image folder."""

    train: Path  # the root itself, if no sub-folder is for training
    evaluation: Path | None  # None: no folder is for evaluation
    beside: frozenset[str]  # sub-folders of `train` that are splits of their own, not classes
    unused: list[str]  # sub-folders of the root that are neither


def find_splits(root: Path, train_split: str, eval_split: str) -> Splits:
    """Finds the folders for training and for evaluation in `root`.

    The settings name sub-folders: exactly, in another case, or in another of the usual spellings (`train`, `Training`;
    `val`, `valid`, `validation`, `eval`; `test`, `testing`). If `eval_split` is "validation", as it is when nobody has
    set it, and there is no such folder, the test folder is taken. An empty setting stands for no folder.

    Raises:
      UserError: if two folders fit, a split that is asked for is not there though others are, or a folder may as well
        be a class.
    """
    folders = sub_folders(root)
    train = _find(root, folders, "data.train_split", train_split)
    evaluation = _find(root, folders, "data.eval_split", eval_split)
    if train is not None:
        taken = {folder.name for folder in (train, evaluation) if folder}
        unused = [name for name in folders if name not in taken]
        if evaluation is None and eval_split:
            _check_no_other_pictures(root, train, unused)
        return Splits(train, evaluation, frozenset(), unused)
    beside = {name for name in folders if eval_split and name.lower() in VALIDATION + TEST}
    beside |= {evaluation.name} if evaluation and evaluation.parent == root else set()
    if eval_split == USUAL["data.eval_split"]:
        _check_not_classes(root, sorted(beside), [name for name in folders if name not in beside])
    unused = [name for name in sorted(beside) if evaluation is None or name != evaluation.name]
    return Splits(root, evaluation, frozenset(beside), unused)


def check_no_hidden_splits(root: Path, files: list[str], splits: Splits) -> None:
    """Refuses sub-folders that look like splits though nothing says so, where they would be taken for classes.

    Args:
      root: the image folder, which has no sub-folder for training.
      files: its training pictures, relative to it.
    """
    inner: dict[str, set[str]] = {name: set(sub_folders(root / name)) for name in splits.beside}
    for file in files:
        if file.count(os.sep) > 1:
            folder, below, _ = file.split(os.sep, 2)
            inner.setdefault(folder, set()).add(below)
    names = [*folders_of(files), *sorted(splits.beside)]
    train, others = (next((n for n in names if _has_word(n, words)), None) for words in (TRAIN, VALIDATION + TEST))
    if train and others:
        raise UserError(
            f"{root}: {train} and {others} are named like splits: set data.train_split={train} and "
            f"data.eval_split={others}, or data.train_split='' if they are classes"
        )
    for one, other in itertools.combinations(sorted(inner) if len(inner) <= MOST else (), 2):
        shared = sorted(inner[one] & inner[other])
        if len(shared) > 1 and not {one, other} <= splits.beside:
            raise UserError(
                f"{root}: {one} and {other} hold the same class folders ({first_few(shared)}), as splits do: which is "
                "which? Set data.train_split and data.eval_split to their names, or data.train_split='' if they are "
                "classes"
            )
    for folder, names in inner.items():
        known = [name for name in sorted(names) if name.lower() in TRAIN + VALIDATION + TEST]
        if any(name.lower() in TRAIN for name in known) and len(known) > 1:
            raise UserError(
                f"{root}: its folder {folder} holds {' and '.join(known)}, as splits do: "
                f"set data.path={root / folder}, or data.train_split='' if they are part of a class"
            )


def _has_word(name: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words stands apart in a name, as in train2017 and images-val."""
    return any(word in words for word in re.split(r"[\W\d_]+", name.lower()))


def _find(root: Path, folders: list[str], setting: str, name: str) -> Path | None:
    """The sub-folder that a setting means; None if it means none, or there are no splits at all."""
    if not name:
        return None
    usual = name == USUAL[setting]
    if not usual and (root / name).is_dir():  # also one further below
        return root / name
    roles = [role for role in (TRAIN, VALIDATION, TEST) if name.lower() in role]
    if usual:
        spellings = roles + [TEST] * (roles == [VALIDATION])
    else:
        spellings = [(name.lower(),), *roles]
    for names in spellings:
        found = [folder for folder in folders if folder.lower() in names]
        if len(found) > 1:
            remedy = " or ".join(f"{setting}={'./' * (folder == USUAL[setting])}{folder}" for folder in found)
            raise UserError(f"{root} holds {' and '.join(found)}: which is meant? Set {remedy}")
        if found:
            return root / found[0]
    if not usual and (not roles or any(folder.lower() in TRAIN + VALIDATION + TEST for folder in folders)):
        there = f"there are {first_few(folders)}" if folders else "it has no sub-folders"
        raise UserError(f"{setting}={name}: {root} has no such sub-folder; {there}")
    return None


def _check_no_other_pictures(root: Path, train: Path, others: list[str]) -> None:
    """Refuses a folder where the training folder looks like one class (trains, beside cars) and not like a split."""
    for name in others:
        if list_pictures(root / name).files:
            raise UserError(
                f"{root} holds pictures in {train.name} and in {name}: is {train.name} a class or a split? "
                "Set data.train_split='' for a class; for a split, set data.eval_split to the name of the other "
                "one, or to '' to hold out a share of this one"
            )


def _check_not_classes(root: Path, splits: list[str], others: list[str]) -> None:
    """Refuses a folder where one named like a split looks like a class among others (tests, beside cars)."""
    for name in splits:
        if holds_pictures(root / name) and any(holds_pictures(root / other) for other in others):
            setting = f"data.eval_split={'./' * (name == USUAL['data.eval_split'])}{name}"
            raise UserError(
                f"{root} holds pictures in {name} and in {first_few(others)}: is {name} a class or a split? "
                f"Set data.eval_split='' for a class, {setting} for a split"
            )


def class_folders(folder: Path, files: list[str]) -> list[str] | None:
    """The class folders of the pictures in `folder`, in the order of their names; None if they lie in it directly.

    Raises:
      UserError: for pictures of both kinds.
    """
    classes = folders_of(files)
    loose = next((file for file in files if os.sep not in file), None)
    if classes and loose:
        raise UserError(
            f"{folder} holds both pictures ({loose}) and folders of pictures ({classes[0]}): "
            "move all pictures into class folders, or all into the folder itself"
        )
    return classes or None
