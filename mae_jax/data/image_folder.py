"""A folder of pictures as a source: class folders, or a flat folder without labels."""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from mae_jax.data.files import read_picture_file
from mae_jax.data.formats import EXTENSIONS
from mae_jax.data.holding_out import hold_out
from mae_jax.data.listing import Listing, describe_unread, find_folder, first_few, folder_of, list_pictures
from mae_jax.data.splits import Splits, check_no_hidden_splits, class_folders, find_splits
from mae_jax.runtime.errors import UserError


class NothingToTrainOn(UserError):
    """All pictures of the folder are for evaluation."""


class ImageFolder:
    """Pictures of `path`, as encoded bytes.

    Training pictures lie in the sub-folder of `path` that `train_split` means if there is one, otherwise in `path`
    itself; evaluation pictures in the one that `eval_split` means (see `find_splits`). Where there is no such folder,
    the share `eval_fraction` of the training pictures is held out for evaluation, of each class alike if `stratify`;
    1: all. Folders of pictures are classes, in the order of their names; a picture may lie at any depth below its class
    folder. A folder that holds the pictures themselves is unlabelled. Hidden files and folders are skipped.

    Attributes:
      place: where the pictures of this split lie, for people.
      notes: of the evaluation split: what a person should know of both.

    Raises:
      UserError: no path, no folder, no pictures, what `find_splits` and `list_pictures` refuse, or an evaluation class
        that training does not have. NothingToTrainOn: there are pictures for evaluation alone.
    """

    in_memory, picture_size = False, None

    def __init__(
        self,
        path: str | None,
        split: str,
        train_split: str,
        eval_split: str,
        eval_fraction: float,
        stratify: bool = True,
    ):
        root = find_folder(path)
        splits = find_splits(root, train_split, eval_split)
        training = list_pictures(splits.train, splits.beside)
        if splits.train == root and train_split:
            check_no_hidden_splits(root, training.files, splits)
        classes = class_folders(splits.train, training.files)
        if splits.evaluation is None:
            _check_pictures(splits.train, training)
            parts = hold_out(training.files, eval_fraction, splits.train, bool(classes) and stratify)
        else:
            parts = training.files, []
        self._folder, self.class_names = splits.train, classes
        self.place, self.notes = f"in {splits.train}", []
        if split == "train":
            _check_trainable(splits, parts[0], eval_fraction)
            self._files = parts[0]
        elif splits.evaluation is None:
            self._files = parts[1]
            self.place = f"held out of {splits.train}" if parts[0] else f"in {splits.train} (all of it)"
            self.notes = _notes({splits.train: training}, splits.unused) + _lacking(classes, *parts)
        else:
            evaluation = list_pictures(splits.evaluation)
            _check_pictures(splits.evaluation, evaluation)
            found = class_folders(splits.evaluation, evaluation.files)
            if training.files:  # otherwise there are only evaluation folders, which say themselves what the classes are
                _check_classes(splits, found, classes)
                found = found and classes
            self._folder, self.class_names, self._files = splits.evaluation, found, evaluation.files
            self.place = f"in {splits.evaluation}"
            self.notes = _notes({splits.train: training, splits.evaluation: evaluation}, splits.unused)
            self.notes += _lacking(found, training.files, evaluation.files)
        self.num_classes = len(self.class_names) if self.class_names else 0
        self._label_of = {name: label for label, name in enumerate(self.class_names or ())}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        file = self._files[index]
        return {"image": read_picture_file(os.path.join(self._folder, file)), "label": self._label(file)}

    def _label(self, file: str) -> int:
        return self._label_of[folder_of(file)] if self._label_of else -1

    def labels(self) -> np.ndarray:
        """int64 [n]: the labels of all pictures, -1: none; from their folders' names."""
        return np.asarray([self._label(file) for file in self._files], np.int64)

    def name_of(self, index: int) -> str:
        return os.path.join(self._folder, self._files[index])


def _check_pictures(folder: Path, found: Listing) -> None:
    if not found.files:
        there = f"; there are {unread}" if (unread := describe_unread(found.unread)) else ""
        raise UserError(
            f"no pictures found in {folder}: expected files ending in {' '.join(EXTENSIONS)}, any case{there}"
        )


def _check_trainable(splits: Splits, files: list[str], eval_fraction: float) -> None:
    if splits.evaluation and _overlap(splits):
        raise UserError(
            f"{splits.train} is for training and {splits.evaluation} for evaluation, but they share pictures: "
            "name another folder in data.eval_split"
        )
    if not files and splits.evaluation:
        raise NothingToTrainOn(
            f"no pictures to learn from: besides {splits.evaluation} there are none in {splits.train}"
        )
    if not files:
        raise NothingToTrainOn(
            f"data.eval_fraction={eval_fraction} leaves none of the pictures in {splits.train} to learn from: "
            "set it to 0.1, for example"
        )


def _overlap(splits: Splits) -> bool:
    """Whether one of the two folders lies in the other, where that is not left out of it."""
    train, evaluation = splits.train.resolve(), splits.evaluation.resolve()
    if train.is_relative_to(evaluation):
        return True
    return evaluation.is_relative_to(train) and evaluation.relative_to(train).parts[0] not in splits.beside


def _check_classes(splits: Splits, eval_classes: list[str] | None, classes: list[str] | None) -> None:
    unknown = sorted(set(eval_classes or ()) - set(classes or ()))
    if unknown:
        raise UserError(
            f"{splits.evaluation} has the class folder {unknown[0]!r} ({len(unknown)} such) that {splits.train} lacks: "
            "give both the same class folders"
        )


def _notes(listings: dict[Path, Listing], unused: list[str]) -> list[str]:
    """What lies in the folders and is not taken, a line each."""
    notes = [
        f"no picture in {len(found.empty):,} of the folders in {folder}: {first_few(found.empty)}"
        for folder, found in listings.items()
        if found.empty
    ]
    unread = sum((found.unread for found in listings.values()), Counter())
    notes += [describe_unread(unread)] if unread else []
    return notes + ([f"folders that are not used: {first_few(unused)}"] if unused else [])


def _lacking(classes: list[str] | None, train_files: list[str], eval_files: list[str]) -> list[str]:
    """A line for each side on which classes have no picture; nothing if one side has none at all."""
    notes = []
    if train_files and eval_files:
        for files, purpose in ((train_files, "learn from"), (eval_files, "evaluate on")):
            lacking = sorted(set(classes or ()) - set(map(folder_of, files)))
            if lacking:
                notes.append(
                    f"no picture to {purpose} of {len(lacking):,} of {len(classes):,} classes: {first_few(lacking)}"
                )
    return notes
