"""Pictures in rows with labels, splits and groups: what tables, parquet and tars have in common."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import first_few
from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.labels import Cell, Labels, encode_labels, kind_of
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


class RowSource(Source):
    """The pictures of one split of the `Rows` that a subclass's `read_rows` finds.

    Classes are those of the training rows, unless others follow in the evaluation rows. Raises UserError for rows that
    cannot be used; NothingToTrainOn if all are for evaluation.
    """

    def __init__(self, split: str, data: ConfigDict, image_size: Size, channels: int, found: Rows | None = None):
        rows = found or self.read_rows(data)
        train, evaluation, notes = split_rows(rows, data)
        if split == "train" and not len(train):
            raise NothingToTrainOn(
                f"no training pictures in {rows.place}: data.train_split={data.train_split}, data.eval_split="
                f"{data.eval_split}, data.eval_fraction={data.eval_fraction} leave none"
            )
        if split == "eval" and not len(evaluation):
            raise UserError(f"no pictures to evaluate on in {rows.place}: data.eval_split={data.eval_split}")
        self._rows, self._reader = (train if split == "train" else evaluation), rows.reader
        labels = encode(rows, data, train) if len(train) else None
        if split == "eval":
            labels = encode(rows, data, evaluation, labels and labels.class_names)
        self.label_kind, self.class_names, self._labels = labels
        self.place = f"in {rows.place}" + (f" {split}" if len(train) and len(evaluation) else "")
        self.notes = [*rows.notes, *notes] if split == "eval" else []

    @classmethod
    def open_both(cls, data: ConfigDict, image_size: Size, channels: int) -> tuple[Source, Source]:
        rows = cls.read_rows(data)
        return tuple(cls(split, data, image_size, channels, rows) for split in ("train", "eval"))

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
    """The name of the column that a setting, or else one of its usual names, means; None if there is none."""
    columns, wanted = list(columns), data[setting.removeprefix("data.")]
    if wanted is not None:
        for name in [wanted] if isinstance(wanted, str) else wanted:
            if name not in columns:
                raise UserError(f"{setting}={name}: {place} has no such column; it has {first_few(columns)}")
        return wanted
    by_name = {name.lower(): name for name in reversed(columns)}
    return next((by_name[name] for name in USUAL_COLUMNS[setting].split() if name in by_name), None)


def find_label_columns(columns: Iterable[str], data: ConfigDict, place: str) -> list[str]:
    """The names of the columns with labels; UserError if there is none though other settings ask for labels."""
    found = find_column(columns, data, "data.label_column", place)
    if found is None and (data.label_kind or data.label_separator):
        asked = "data.label_kind" if data.label_kind else "data.label_separator"
        raise UserError(f"{asked}={data[asked[5:]]}, but which column of {place} has the labels? Set data.label_column")
    return [found] if isinstance(found, str) else list(found or ())


def encode(rows: Rows, data: ConfigDict, chosen: np.ndarray, known: Sequence[str] | None = None) -> Labels:
    """The labels of the chosen rows. Names of classes begin with the `known` ones."""
    if not rows.labels:
        return Labels("class", None, np.full(len(chosen), -1, np.int64))
    columns = {name: [cells[row] for row in chosen] for name, cells in rows.labels.items()}
    return encode_labels(columns, data, lambda place: rows.reader.where(int(chosen[place])), rows.schema, known)


def split_rows(rows: Rows, data: ConfigDict) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows for training and evaluation, int [n] each, and notes for users.

    By the names in `rows.splits`, in the spellings of `find_splits`; without evaluation rows a share of the training
    rows is held out. UserError if a group would lie in both.
    """
    if rows.splits is None:
        train, evaluation, notes = np.arange(len(rows.names)), None, []
    else:
        splits = np.array([str(name or "").strip() for name in rows.splits], object)
        there = sorted({*splits} - {""})
        train_name = find_name(there, "data.train_split", data.train_split, rows.place, "split")
        eval_name = find_name(there, "data.eval_split", data.eval_split, rows.place, "split")
        if train_name is None and eval_name is None:
            raise UserError(
                f"{rows.place}: its splits are {first_few(there) or 'empty'}: set data.train_split and data.eval_split "
                "to two of these"
            )
        train, evaluation = (np.flatnonzero(splits == name) for name in (train_name, eval_name))
        evaluation = None if eval_name is None else evaluation
        unused = [name for name in there if name not in (train_name, eval_name)]
        notes = [f"splits that are not used: {first_few(unused)}"] if unused else []
        if empty := int((splits == "").sum()):
            first = rows.reader.where(int(np.flatnonzero(splits == "")[0]))
            notes.append(f"pictures without a split, which are not used: {empty:,}, the first in {first}")
    if evaluation is None:
        by_class = data.stratify and rows.labels and kind_of(data, list(rows.labels)) == "class"
        (cells,) = rows.labels.values() if by_class else (None,)
        held = held_out(
            [rows.names[row] for row in train],
            data.eval_fraction,
            rows.place,
            [cells[row] for row in train] if by_class else None,
            [rows.groups[row] for row in train] if rows.groups is not None else None,
        )
        return train[~held], train[held], notes
    if rows.groups is not None:
        places = {rows.groups[row]: row for row in train}
        for row in evaluation:
            if (other := places.get(rows.groups[row])) is not None:
                raise UserError(
                    f"the group {rows.groups[row]} is for training in {rows.reader.where(other)} and for evaluation in "
                    f"{rows.reader.where(int(row))}: put it into one split, or unset data.group_column"
                )
    return train, evaluation, notes
