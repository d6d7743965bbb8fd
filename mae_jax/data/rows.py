"""Pictures in rows with labels, splits and groups: what tables, parquet and tars have in common."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import first_few
from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.labels import Cell, Labels, encode_labels, text_of
from mae_jax.data.sources import Source
from mae_jax.data.splits import find_name, held_out
from mae_jax.data.transforms import Size
from mae_jax.runtime.errors import UserError

# Names of columns that are found without a setting, ignoring case; the first that is there.
USUAL_COLUMNS = {
    "data.image_column": "file filename file_name filepath file_path path image image_path image_file img jpg png",
    "data.label_column": "label labels class class_name category target cls",
    "data.split_column": "split subset partition",
    "data.group_column": "group group_id",
}


class Reader(Protocol):
    """Reads pictures by row; reader processes get a pickled copy."""

    def read(self, row: int) -> bytes:
        """The file of a picture; an OSError means a bad picture."""

    def name(self, row: int) -> str:
        """The name of a picture, for messages."""

    def where(self, row: int) -> str:
        """The place of a row, for messages: "line 7 of labels.csv"."""


class Rows(NamedTuple):
    """What is known of n pictures before any is read."""

    place: str  # for messages
    names: Sequence[str]  # all different; hashes of them decide what is held out
    reader: Reader
    labels: dict[str, Sequence[Cell]] = {}  # columns; none: no labels
    schema: Sequence[str] | None = None  # names of classes, if labels are their places
    splits: Sequence[str | None] | None = None  # None: no splits
    groups: Sequence[Any] | None = None
    notes: tuple[str, ...] = ()


class Divided(NamedTuple):
    """Rows and the indices of both splits, int [n], with their labels."""

    rows: Rows
    train: tuple[np.ndarray, Labels]
    eval: tuple[np.ndarray, Labels]
    notes: list[str]


class RowSource(Source):
    """The pictures of one split of the `Rows` that a subclass's `read_rows` finds.

    Classes are those of the training rows, unless others follow in the evaluation rows. Raises UserError for rows that
    cannot be used; NothingToTrainOn if all are for evaluation.
    """

    def __init__(self, split: str, data: ConfigDict, image_size: Size, channels: int, found: Divided | None = None):
        found = found or divide(self.read_rows(data), data)
        rows, (indices, labels) = found.rows, getattr(found, split)
        if not len(indices):
            kind, what = (NothingToTrainOn, "train") if split == "train" else (UserError, "evaluate")
            remedy = "" if data.eval_fraction == 1 else "; data.train_split='' takes all that are not for evaluation"
            raise kind(
                f"no pictures to {what} on in {rows.place}: data.train_split={data.train_split!r}, data.eval_split="
                f"{data.eval_split!r} and data.eval_fraction={data.eval_fraction} leave none{remedy}"
            )
        self._rows, self._reader, self._labels = indices, rows.reader, labels.values
        self.label_kind, self.class_names = labels.kind, labels.class_names
        self.place = f"in {rows.place}" + (f" {split}" if len(found.train[0]) and len(found.eval[0]) else "")
        self.notes = [*rows.notes, *found.notes] if split == "eval" else []
        self.fingerprint = _fingerprint([rows.names[row] for row in indices], labels)

    @classmethod
    def open_both(cls, data: ConfigDict, image_size: Size, channels: int) -> tuple[Source, Source]:
        found = divide(cls.read_rows(data), data)
        return tuple(cls(split, data, image_size, channels, found) for split in ("train", "eval"))

    @classmethod
    def read_rows(cls, data: ConfigDict) -> Rows:
        """Finds the rows of `data.path`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._reader.read(int(self._rows[index])), "label": self._labels[index]}

    def labels(self) -> np.ndarray:
        return self._labels

    def name_of(self, index: int) -> str:
        return self._reader.name(int(self._rows[index]))


def find_column(columns: Iterable[str], data: ConfigDict, setting: str, place: str) -> str | Sequence[str] | None:
    """The name of the column that a setting, or else one of its usual names, means; None if there is none.

    An empty setting means no column.
    """
    columns, wanted = list(columns), data[setting.removeprefix("data.")]
    if wanted is not None:
        for name in [wanted] if isinstance(wanted, str) else wanted:
            if name and name not in columns:
                raise UserError(f"{setting}={name}: {place} has no such column; it has {first_few(columns)}")
        return wanted or None
    by_name = {name.lower(): name for name in reversed(columns)}
    return next((by_name[name] for name in USUAL_COLUMNS[setting].split() if name in by_name), None)


def find_label_columns(columns: Iterable[str], data: ConfigDict, place: str) -> list[str]:
    """The names of the columns with labels; UserError if there is none though other settings ask for labels."""
    found = find_column(columns, data, "data.label_column", place)
    if found is None and (data.label_kind or data.label_separator):
        asked = "data.label_kind" if data.label_kind else "data.label_separator"
        raise UserError(f"{asked}={data[asked[5:]]}, but which column of {place} has the labels? Set data.label_column")
    return [found] if isinstance(found, str) else list(found or ())


def divide(rows: Rows, data: ConfigDict) -> Divided:
    """Divides rows into both splits; UserError for labels or splits that cannot be used."""
    labels = Labels("class", None, np.full(len(rows.names), -1))
    if rows.labels:
        labels = encode_labels(rows.labels, data, rows.reader.where, rows.schema)
    train, evaluation, notes = split_rows(rows, data, labels.values if labels.kind == "class" else None)
    known = labels.take(train)
    return Divided(rows, (train, known), (evaluation, labels.take(evaluation, known.class_names or ())), notes)


def split_rows(rows: Rows, data: ConfigDict, classes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows for training and evaluation, int [n] each, and notes for users.

    By the names in `rows.splits`, in the spellings of `find_splits`; without evaluation rows a share of the training
    rows is held out, of each of the `classes`, int [n]. UserError if a group would lie in both.
    """
    train, evaluation, notes = _named_splits(rows, data)
    groups = None
    if rows.groups is not None:  # a row without one is a group of its own
        groups = [text_of(group) or name for group, name in zip(rows.groups, rows.names, strict=True)]
    if evaluation is None:
        names, classes, held_groups = (
            None if column is None else [column[row] for row in train]
            for column in (rows.names, classes.tolist() if data.stratify and classes is not None else None, groups)
        )
        held = held_out(names, data.eval_fraction, rows.place, classes, held_groups)
        if groups is not None:
            counts = [len({groups[row] for row in some}) for some in (train[held], train)]
            notes.append("whole groups are held out: {:,} of {:,}".format(*counts))
        return train[~held], train[held], notes
    if groups is not None:
        places = {groups[row]: row for row in train}
        for row in evaluation:
            if (other := places.get(groups[row])) is not None:
                raise UserError(
                    f"the group {groups[row]} is for training in {rows.reader.where(int(other))} and for evaluation in "
                    f"{rows.reader.where(int(row))}: put it into one split, or set data.group_column=''"
                )
    return train, evaluation, notes


def _named_splits(rows: Rows, data: ConfigDict) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Rows of the splits that the settings name, and notes. Evaluation is None if none is for it."""
    splits = [*map(text_of, rows.splits)] if rows.splits is not None else [""] * len(rows.names)
    spelling: dict[str, str] = {}
    for name in sorted({*splits} - {""}):
        spelling.setdefault(name.lower(), name)
    there = [*spelling.values()]
    train, evaluation = (
        find_name(there, setting, data[setting[5:]], rows.place, "split")
        for setting in ("data.train_split", "data.eval_split")
    )
    if there and data.train_split and train == evaluation:
        what = "none of these" if train is None else f"both {train}"
        raise UserError(
            f"{rows.place} has the splits {first_few(there)}; data.train_split={data.train_split} and data.eval_split="
            f"{data.eval_split} are {what}: set them to two of these, or data.train_split='' for all others"
        )
    codes = {"": -1} | {name: place for place, name in enumerate(spelling)}
    of_row = np.fromiter((codes[name.lower()] for name in splits), np.int64, len(splits))
    in_train, in_evaluation = (of_row == (-2 if name is None else there.index(name)) for name in (train, evaluation))
    notes = []
    if not there or not data.train_split:
        in_train = ~in_evaluation
    else:
        unused, empty = [name for name in there if name not in (train, evaluation)], np.flatnonzero(of_row == -1)
        notes += [f"splits that are not used: {first_few(unused)}"] if unused else []
        if len(empty):
            first = rows.reader.where(int(empty[0]))
            notes.append(f"pictures without a split, which are not used: {len(empty):,}, the first in {first}")
    return np.flatnonzero(in_train), None if evaluation is None else np.flatnonzero(in_evaluation), notes


def _fingerprint(names: Sequence[str], labels: Labels) -> str:
    found = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape"))
    found.update(repr((labels.kind, labels.class_names)).encode("utf-8", "backslashreplace"))
    found.update(labels.values.tobytes())
    return found.hexdigest()
