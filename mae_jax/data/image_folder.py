"""Image folders as sources, with class folders or flat and unlabelled; and picture files without any split."""

import bisect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import (
    EXTENSIONS,
    Listing,
    check_exists,
    check_extensions,
    check_one_kind,
    describe_unread,
    find_folder,
    first_few,
    folder_of,
    folders_of,
    is_picture_name,
    list_pictures,
    read_picture_file,
)
from mae_jax.data.sources import Source
from mae_jax.data.splits import (
    TEST,
    TRAIN,
    VALIDATION,
    Splits,
    check_no_hidden_splits,
    class_folders,
    find_splits,
    hold_out,
)
from mae_jax.data.transforms import Size
from mae_jax.runtime.errors import UserError


class NothingToTrainOn(UserError):
    """All pictures of the folder are for evaluation."""


class _Found(NamedTuple):
    splits: Splits
    listings: dict[Path, Listing]  # of splits.train, of which some may be held out, and splits.evaluation
    files: tuple[list[str], list[str]]  # for training and for evaluation
    classes: list[str] | None  # of the training folder


def _find_pictures(data: ConfigDict) -> _Found:
    root = find_folder(data.path)
    splits = find_splits(root, data.train_split, data.eval_split)
    extensions = check_extensions(data.extensions)
    listings = {splits.train: list_pictures(splits.train, splits.beside, extensions)}
    training = listings[splits.train].files
    if data.extensions is None:
        check_one_kind(splits.train, training)
    if splits.train == root and data.train_split:
        check_no_hidden_splits(root, training, splits)
    classes = class_folders(splits.train, training)
    if splits.evaluation is None:
        _check_pictures(splits.train, listings[splits.train])
        files = hold_out(training, data.eval_fraction, splits.train, bool(classes) and data.stratify)
        return _Found(splits, listings, files, classes)
    listings[splits.evaluation] = list_pictures(splits.evaluation, extensions=extensions)
    return _Found(splits, listings, (training, listings[splits.evaluation].files), classes)


class _Pictures(Source):
    """`_files` below `_folder`, encoded; a label is the place of a file's first folder in `class_names`."""

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


class PictureFiles(_Pictures):
    """One picture file, or all below a folder in the order of their names; UserError if there is none.

    Those in a folder with one of the `class_names` have it as their label; None: the first folders' names are used.
    `setting` is what names the path, for messages; `extensions` is `data.extensions`.
    """

    def __init__(
        self,
        path: str | Path,
        class_names: Sequence[str] | None = (),
        setting: str = "data.path",
        extensions: Sequence[str] | None = None,
    ):
        check_exists(str(path), setting)
        self._folder, name = os.path.split(path)
        self._files = [name] if os.path.isfile(path) and is_picture_name(name) else []
        self.place = f"in {path}"
        if os.path.isdir(path):
            found = list_pictures(path, extensions=check_extensions(extensions))
            self._folder, self._files = path, found.files
            self.notes = describe_unread(found)
            _check_pictures(path, found)
            if extensions is None:
                check_one_kind(path, found.files)
        elif not self._files:
            raise UserError(
                f"{setting}={path} is not a picture, whose file would end in one of {' '.join(EXTENSIONS)}; of a table "
                "or of shards, give data.name too"
            )
        if class_names is None:
            class_names = folders_of(self._files)
            if {name.lower() for name in class_names} <= {*TRAIN, *VALIDATION, *TEST}:
                class_names = ()
        self._places = {name: place for place, name in enumerate(class_names)}
        if any(self._label(file) >= 0 for file in self._files):
            self.class_names = list(class_names)

    def _label(self, file: str) -> int:
        return next((self._places[part] for part in file.split(os.sep)[:-1] if part in self._places), -1)


class ImageFolder(_Pictures):
    """Pictures below `data.path`: for training and evaluation as `find_splits` says, or with a share held out.

    Folders of pictures are classes, numbered in the order of their names. Evaluation pictures have the labels of
    training, unless that lacks one of their classes. Raises UserError; NothingToTrainOn if all are for evaluation.
    """

    def __init__(self, split: str, data: ConfigDict, image_size: Size, channels: int, found: _Found | None = None):
        splits, listings, files, classes = found = found or _find_pictures(data)
        self._folder, self._files, self.class_names = splits.train, files[split == "eval"], classes
        self.place = f"in {splits.train}"
        if split == "train":
            _check_trainable(found, data.eval_fraction)
            return
        if splits.evaluation is None:
            self.place = f"held out of {splits.train}" if files[0] else f"in {splits.train} (all of it)"
        else:
            _check_pictures(splits.evaluation, listings[splits.evaluation])
            own = class_folders(splits.evaluation, files[1])
            self.class_names = classes if own and set(own) <= set(classes or ()) else own
            self._folder, self.place = splits.evaluation, f"in {splits.evaluation}"
        self.notes = [
            f"no picture in {len(listing.empty):,} of the folders in {folder}: {first_few(listing.empty)}"
            for folder, listing in listings.items()
            if listing.empty
        ]
        self.notes += describe_unread(*listings.values())
        self.notes += [note for listing in listings.values() for note in listing.notes]
        self.notes += [f"folders that are not used: {first_few(splits.unused)}"] if splits.unused else []
        for part, purpose in zip(files, ("learn from", "evaluate on"), strict=True):
            lacking = sorted(set(self.class_names or ()) - set(map(folder_of, part)))
            if lacking and all(files):
                share = f"{len(lacking):,} of {len(self.class_names):,} classes"
                self.notes.append(f"no pictures to {purpose} for {share}: {first_few(lacking)}")

    @classmethod
    def open_both(cls, data: ConfigDict, image_size: Size, channels: int) -> tuple[Source, Source]:
        found = _find_pictures(data)  # once: large folders take minutes
        return tuple(cls(split, data, image_size, channels, found) for split in ("train", "eval"))


def _check_pictures(folder: Path, listing: Listing) -> None:
    if not listing.files:
        there = "; ".join(["", *describe_unread(listing)])
        raise UserError(
            f"no pictures found in {folder}: expected files ending in {' '.join(EXTENSIONS)}, any case{there}"
        )


def _check_trainable(found: _Found, eval_fraction: float) -> None:
    splits = found.splits
    if splits.evaluation:
        train, evaluation = splits.train.resolve(), splits.evaluation.resolve()
        below = evaluation.is_relative_to(train) and splits.beside.isdisjoint(evaluation.relative_to(train).parts[:1])
        if below or train.is_relative_to(evaluation):
            raise UserError(
                f"{splits.train} is for training and {splits.evaluation} for evaluation, but they share pictures: "
                "name another folder in data.eval_split"
            )
    if not found.files[0]:
        why = f"data.eval_fraction={eval_fraction} leaves none of the pictures: set it to 0.1, for example"
        if splits.evaluation:
            why = f"it has only those of {splits.evaluation}"
        raise NothingToTrainOn(f"no training pictures in {splits.train}: {why}")
