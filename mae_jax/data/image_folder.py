"""Image folders as sources, with class folders or flat and unlabelled; and picture files without any split."""

import bisect
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import (
    EXTENSIONS,
    Listing,
    check_exists,
    describe_unread,
    find_folder,
    first_few,
    folder_of,
    is_picture_name,
    list_pictures,
    read_picture_file,
)
from mae_jax.data.sources import Source
from mae_jax.data.splits import Splits, check_no_hidden_splits, class_folders, find_splits, hold_out
from mae_jax.runtime.errors import UserError


class NothingToTrainOn(UserError):
    """All pictures of the folder are for evaluation."""


class _Found(NamedTuple):
    splits: Splits
    training: Listing  # of splits.train; some may be held out
    evaluation: Listing | None  # of splits.evaluation
    files: tuple[list[str], list[str]]  # for training and for evaluation
    classes: list[str] | None  # of the training folder


def _find_pictures(data: ConfigDict) -> _Found:
    root = find_folder(data.path)
    splits = find_splits(root, data.train_split, data.eval_split)
    training = list_pictures(splits.train, splits.beside)
    if splits.train == root and data.train_split:
        check_no_hidden_splits(root, training.files, splits)
    classes = class_folders(splits.train, training.files)
    if splits.evaluation is None:
        _check_pictures(splits.train, training)
        files = hold_out(training.files, data.eval_fraction, splits.train, bool(classes) and data.stratify)
        return _Found(splits, training, None, files, classes)
    evaluation = list_pictures(splits.evaluation)
    return _Found(splits, training, evaluation, (training.files, evaluation.files), classes)


class ImageFolder(Source):
    """Pictures below `data.path`, as encoded bytes.

    `find_splits` finds the folders for training and evaluation. Without one for evaluation, the share
    `data.eval_fraction` of the training pictures is held out (`hold_out`). Folders of pictures are classes, numbered in
    the order of their names; their pictures may be at any depth. A folder that holds pictures directly is unlabelled.
    Evaluation pictures have the labels of training, unless that lacks one of their classes. Raises UserError if nothing
    is found, or as `find_splits` and `list_pictures` do; NothingToTrainOn if all pictures are for evaluation.
    """

    def __init__(
        self, split: str, data: ConfigDict, image_size: tuple[int, int], channels: int, found: _Found | None = None
    ):
        splits, training, evaluation, files, classes = found = found or _find_pictures(data)
        self._folder, self._files, self.class_names = splits.train, files[split == "eval"], classes
        self.place = f"in {splits.train}"
        if split == "train":
            _check_trainable(found, data.eval_fraction)
            return
        listings = {splits.train: training}
        if splits.evaluation is None:
            self.place = f"held out of {splits.train}" if files[0] else f"in {splits.train} (all of it)"
        else:
            _check_pictures(splits.evaluation, evaluation)
            listings[splits.evaluation] = evaluation
            own = class_folders(splits.evaluation, evaluation.files)
            self.class_names = classes if own and set(own) <= set(classes or ()) else own
            self._folder, self.place = splits.evaluation, f"in {splits.evaluation}"
        self.notes = _notes(listings, splits.unused) + _lacking(self.class_names, *files)

    @classmethod
    def open_both(cls, data: ConfigDict, image_size: tuple[int, int], channels: int) -> tuple[Source, Source]:
        found = _find_pictures(data)  # once: large folders take minutes
        return tuple(cls(split, data, image_size, channels, found) for split in ("train", "eval"))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        file = self._files[index]
        return {"image": read_picture_file(os.path.join(self._folder, file)), "label": self._label(file)}

    def _label(self, file: str) -> int:
        return bisect.bisect_left(self.class_names, folder_of(file)) if self.class_names else -1

    def labels(self) -> np.ndarray:
        return np.asarray([self._label(file) for file in self._files], np.int64)

    def name_of(self, index: int) -> str:
        return os.path.join(self._folder, self._files[index])


class PictureFiles(Source):
    """One picture file, or all below a folder in the order of their names, unlabelled; UserError if there is none."""

    def __init__(self, path: str | Path):
        check_exists(str(path))
        path, unread = Path(path), ""
        if path.is_dir():
            found = list_pictures(path)
            self._files, unread = [path / file for file in found.files], describe_unread(found.unread)
        else:
            self._files = [path] if path.is_file() and is_picture_name(path.name) else []
        if not self._files:
            holds = f"has no pictures{f' ({unread})' if unread else ''}" if path.is_dir() else "is not a picture"
            raise UserError(f"data.path={path} {holds}; files of pictures end in {' '.join(EXTENSIONS)}")
        self.place, self.notes = f"in {path}", [unread] if unread else []

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict:
        return {"image": read_picture_file(self._files[index]), "label": -1}

    def name_of(self, index: int) -> str:
        return str(self._files[index])


def _check_pictures(folder: Path, listing: Listing) -> None:
    if not listing.files:
        there = f"; there are {unread}" if (unread := describe_unread(listing.unread)) else ""
        raise UserError(
            f"no pictures found in {folder}: expected files ending in {' '.join(EXTENSIONS)}, any case{there}"
        )


def _check_trainable(found: _Found, eval_fraction: float) -> None:
    splits = found.splits
    if splits.evaluation and _overlap(splits):
        raise UserError(
            f"{splits.train} is for training and {splits.evaluation} for evaluation, but they share pictures: "
            "name another folder in data.eval_split"
        )
    if not found.files[0] and splits.evaluation:
        raise NothingToTrainOn(
            f"no training pictures: {splits.train} has no pictures other than those of {splits.evaluation}"
        )
    if not found.files[0]:
        raise NothingToTrainOn(
            f"data.eval_fraction={eval_fraction} leaves none of the pictures in {splits.train} to learn from: "
            "set it to 0.1, for example"
        )


def _overlap(splits: Splits) -> bool:
    """Whether the training folder contains the evaluation folder without leaving it out, or the reverse."""
    train, evaluation = splits.train.resolve(), splits.evaluation.resolve()
    if train.is_relative_to(evaluation):
        return True
    return evaluation.is_relative_to(train) and evaluation.relative_to(train).parts[0] not in splits.beside


def _notes(listings: dict[Path, Listing], unused: list[str]) -> list[str]:
    """Lines about what is in the folders but not used."""
    notes = [
        f"no picture in {len(found.empty):,} of the folders in {folder}: {first_few(found.empty)}"
        for folder, found in listings.items()
        if found.empty
    ]
    unread = sum((found.unread for found in listings.values()), Counter())
    notes += [describe_unread(unread)] if unread else []
    return notes + ([f"folders that are not used: {first_few(unused)}"] if unused else [])


def _lacking(classes: list[str] | None, train_files: list[str], eval_files: list[str]) -> list[str]:
    """A line for each split that has no picture of some classes; nothing if a split is empty."""
    notes = []
    if train_files and eval_files:
        for files, purpose in ((train_files, "learn from"), (eval_files, "evaluate on")):
            lacking = sorted(set(classes or ()) - set(map(folder_of, files)))
            if lacking:
                notes.append(
                    f"no pictures to {purpose} for {len(lacking):,} of {len(classes):,} classes: {first_few(lacking)}"
                )
    return notes
