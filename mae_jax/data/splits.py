"""Splits an image folder into training and evaluation pictures: by its sub-folders, or by holding some out."""

import hashlib
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mae_jax.data.files import first_few, folder_of, folders_of, holds_pictures, list_pictures, sub_folders
from mae_jax.runtime.errors import UserError

# Usual folder names, ignoring case.
TRAIN = ("train", "training")
VALIDATION = ("validation", "val", "valid", "eval")
TEST = ("test", "testing")
MAX_SPLITS = 20  # if more folders than this have the same content, they are classes
USUAL = {"data.train_split": "train", "data.eval_split": "validation"}  # the defaults of these settings


class Splits(NamedTuple):
    train: Path  # the root itself, if no sub-folder is for training
    evaluation: Path | None  # None: no folder is for evaluation
    beside: frozenset[str]  # sub-folders of `train` that are splits, not classes
    unused: list[str]  # sub-folders of the root that are neither


def find_splits(root: Path, train_split: str, eval_split: str) -> Splits:
    """Finds the folders for training and evaluation in `root`.

    A setting names a sub-folder exactly, in another case, or in another usual spelling; an empty one means no folder.
    The default "validation" falls back on the test folder. Raises UserError if two folders fit, if a split is missing
    though others exist, or if a folder could also be a class.
    """
    folders = sub_folders(root)
    train = _find(root, folders, "data.train_split", train_split)
    evaluation = _find(root, folders, "data.eval_split", eval_split)
    if train is not None:
        taken = {folder.name for folder in (train, evaluation) if folder}
        unused = [name for name in folders if name not in taken]
        if evaluation is None and eval_split:
            if other := next((name for name in unused if list_pictures(root / name).files), None):
                answer = "data.eval_split to the name of the other one, or to '' to hold out a share of this one"
                raise _class_or_split(root, train.name, other, "data.train_split", answer)
        return Splits(train, evaluation, frozenset(), unused)
    beside = {name for name in folders if eval_split and name.lower() in VALIDATION + TEST}
    beside |= {evaluation.name} if evaluation and evaluation.parent == root else set()
    if eval_split == USUAL["data.eval_split"]:
        classes = [name for name in folders if name not in beside]
        for name in sorted(beside):
            if holds_pictures(root / name) and any(holds_pictures(root / other) for other in classes):
                answer = f"data.eval_split={'./' * (name == eval_split)}{name}"
                raise _class_or_split(root, name, first_few(classes), "data.eval_split", answer)
    unused = [name for name in sorted(beside) if evaluation is None or name != evaluation.name]
    return Splits(root, evaluation, frozenset(beside), unused)


def _class_or_split(root: Path, name: str, others: str, setting: str, answer: str) -> UserError:
    """For a folder that could be a class (trains) next to other classes (cars)."""
    question = f"{root} holds pictures in {name} and in {others}: is {name} a class or a split?"
    return UserError(f"{question} Set {setting}='' for a class; for a split, set {answer}")


def check_no_hidden_splits(root: Path, files: list[str], splits: Splits) -> None:
    """Refuses sub-folders of a root without a training folder that look like splits but would be taken for classes."""
    inner: dict[str, set[str]] = {name: set(sub_folders(root / name)) for name in splits.beside}
    for file in files:
        if file.count(os.sep) > 1:
            folder, below, _ = file.split(os.sep, 2)
            inner.setdefault(folder, set()).add(below)
    roles = (set(TRAIN), {*VALIDATION, *TEST})
    for place, names in {"": [*folders_of(files), *sorted(splits.beside)], **inner}.items():
        words = {name: {name.lower()} if place else {*re.split(r"[\W\d_]+", name.lower())} for name in sorted(names)}
        train, other = (next((name for name in words if words[name] & role), None) for role in roles)
        if train and other:  # train2017, images-val
            raise UserError(
                f"{root / place}: {train} and {other} are named like splits: set data.path={root / place}, "
                f"data.train_split={train} and data.eval_split={other}, or data.train_split='' if they are classes"
            )
    for one, other in itertools.combinations(sorted(inner) if len(inner) <= MAX_SPLITS else (), 2):
        shared = sorted(inner[one] & inner[other])
        if len(shared) > 1 and not {one, other} <= splits.beside:
            raise UserError(
                f"{root}: {one} and {other} hold the same class folders ({first_few(shared)}), as splits do: set "
                "data.train_split and data.eval_split to their names, or data.train_split='' if they are classes"
            )


def _find(root: Path, folders: list[str], setting: str, name: str) -> Path | None:
    """The sub-folder that a setting names; None if the setting is empty, or if there are no splits at all."""
    if name and name != USUAL[setting] and (root / name).is_dir():  # may be nested
        return root / name
    found = find_name(folders, setting, name, root, "sub-folder")
    return None if found is None else root / found


def find_name(there: Sequence[str], setting: str, name: str, place: Path | str, kind: str) -> str | None:
    """The name among those `there` (folders, shards, values of a column: `kind`) that a split's setting means.

    For the spellings see `find_splits`. None if the setting is empty, or if none of the names is that of a split;
    UserError if several fit, or none.
    """
    if not name:
        return None
    usual = name == USUAL[setting]
    if name in there and (not usual or kind != "sub-folder"):
        return name
    roles = [role for role in (TRAIN, VALIDATION, TEST) if name.lower() in role]
    spellings = roles + [TEST] * (roles == [VALIDATION]) if usual else [(name.lower(),), *roles]
    for names in spellings:
        found = [one for one in there if one.lower() in names]
        if len(found) > 1:
            remedy = " or ".join(f"{setting}={'./' * (one == USUAL[setting])}{one}" for one in found)
            raise UserError(f"{place} holds {' and '.join(found)}: which is meant? Set {remedy}")
        if found:
            return found[0]
    if not usual and (not roles or any(one.lower() in TRAIN + VALIDATION + TEST for one in there)):
        known = f"there are {first_few(list(there))}" if there else f"it has no {kind}s"
        raise UserError(f"{setting}={name}: {place} has no such {kind}; {known}")
    return None


def class_folders(folder: Path, files: list[str]) -> list[str] | None:
    """Class folders of the pictures in `folder`, sorted; None if they lie directly in it; UserError if both."""
    classes = folders_of(files)
    loose = next((file for file in files if os.sep not in file), None)
    if classes and loose:
        raise UserError(
            f"{folder} holds both pictures ({loose}) and folders of pictures ({classes[0]}): "
            "move all pictures into class folders, or all into the folder itself"
        )
    return classes or None


def hold_out(files: list[str], fraction: float, folder: Path, by_class: bool) -> tuple[list[str], list[str]]:
    """Splits the pictures of `folder` into (training, evaluation): class by class if `by_class`, else all together.

    `fraction`, in (0, 1], is the share for evaluation. Each class of two or more pictures is on both sides; a single
    picture is for training. (If all classes have only one, they count as one class: pre-training needs no labels.) A
    hash of the name decides, so no run is evaluated on pictures that an earlier one learned from.
    """
    held = held_out(files, fraction, folder, [folder_of(file) for file in files] if by_class else None)
    return list(itertools.compress(files, ~held)), list(itertools.compress(files, held))


def held_out(
    names: Sequence[str],
    fraction: float,
    place: Path | str,
    classes: Sequence[Hashable] | None = None,
    groups: Sequence[str] | None = None,
) -> np.ndarray:
    """Whether each of n differently named pictures is held out, bool [n]; see `hold_out`.

    With `classes` class by class. With `groups` whole groups instead, at least one on each side: in the order of their
    names' hashes those that bring the share of pictures nearer to the fraction; if all are too large, the smallest.
    """
    if fraction == 1:
        return np.ones(len(names), bool)
    if len(names) < 2:
        count = f"{len(names)} picture{'s' * (not names)}"
        raise UserError(f"{place} holds {count}: at least 2 are needed, one to train and one to evaluate")
    held = np.zeros(len(names), bool)
    if groups is not None:
        members = _members(groups)
        if len(members) < 2:
            raise UserError(
                f"{place}: all pictures are of one group, {groups[0]}, which cannot be on both sides: set "
                "data.group_column='', or add pictures of other groups"
            )
        count, target, taken = 0, fraction * len(names), []
        for group in sorted(members, key=_hash):
            if count + len(members[group]) / 2 <= target and len(taken) < len(members) - 1:
                taken.append(group)
                count += len(members[group])
        for group in taken or [min(members, key=lambda group: (len(members[group]), _hash(group)))]:
            held[members[group]] = True
        return held
    by_class = _members(classes) if classes is not None else {}
    if not 1 < len(by_class) < len(names):
        by_class = {"": range(len(names))}
    for rows in by_class.values():
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        held[sorted(rows, key=lambda row: _hash(names[row]))[:count]] = True
    return held


def _members(keys: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """The places of each key."""
    found = defaultdict(list)
    for place, key in enumerate(keys):
        found[key].append(place)
    return found


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape")).digest()
