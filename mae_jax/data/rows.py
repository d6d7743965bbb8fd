"""Pictures in rows with labels, splits and groups: what tables, parquet and tars have in common."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import first_few
from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.labels import Cell, Labels, each, encode_labels, kind_of, text_of
from mae_jax.data.sources import Source
from mae_jax.data.splits import TEST, VALIDATION, find_name, held_out
from mae_jax.data.transforms import Size
from mae_jax.runtime.errors import UserError

# Names of columns that are found without a setting, ignoring case.
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

    def file(self, row: int) -> str:
        """See `Source.file_of`: of pictures without a file of their own, the name."""

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


class Parts(NamedTuple):
    """The rows for training and for evaluation, int64 [n] each, and their labels; None where there are no rows."""

    rows: Rows
    train: np.ndarray
    evaluation: np.ndarray
    train_labels: Labels | None
    evaluation_labels: Labels
    notes: list[str]


class RowSource(Source):
    """The pictures of one split of the `Rows` that a subclass's `read_rows` finds.

    Classes are those of the training rows, unless others follow in the evaluation rows. Raises UserError for rows that
    cannot be used; NothingToTrainOn if all are for evaluation.
    """

    knows_labels = True

    def __init__(self, split: str, data: ConfigDict, image_size: Size, channels: int, found: Parts | None = None):
        parts = found or take_apart(self.read_rows(data), data)
        if split == "train" and not len(parts.train):
            raise NothingToTrainOn(
                f"no training pictures in {parts.rows.place}: data.train_split={data.train_split!r}, data.eval_split="
                f"{data.eval_split!r} and data.eval_fraction={data.eval_fraction} leave none; "
                "if both splits are '' and the fraction is below 1, a share of all is held out"
            )
        is_train, self._reader, self._names = split == "train", parts.rows.reader, parts.rows.names
        self._rows = parts.train if is_train else parts.evaluation
        self.label_kind, self.class_names, self._labels = parts.train_labels if is_train else parts.evaluation_labels
        self.place = f"in {parts.rows.place}" + (f" {split}" if len(parts.train) else "")
        self.notes = [] if is_train else [*parts.rows.notes, *parts.notes]

    @classmethod
    def open_both(cls, data: ConfigDict, image_size: Size, channels: int) -> tuple[Source, Source]:
        parts = take_apart(cls.read_rows(data), data)
        return tuple(cls(split, data, image_size, channels, parts) for split in ("train", "eval"))

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

    def file_of(self, index: int) -> str:
        return self._reader.file(int(self._rows[index]))

    def places(self) -> list[str]:
        """Where each picture is: the same for a picture that other data hold, too."""
        return [self._reader.where(int(row)) for row in self._rows]

    def digest(self) -> str:
        names = "\0".join([self._names[row] for row in self._rows])
        return hashlib.blake2b(names.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_names": None}  # reader processes need none


def find_column(columns: Iterable[str], data: ConfigDict, setting: str, place: str) -> str | Sequence[str] | None:
    """The name of the column that a setting, or else one of its usual names, means; None if there is none, or for "".

    UserError if a column that a setting names is not there, or if several have usual names.
    """
    columns, wanted = list(columns), data[setting.removeprefix("data.")]
    if wanted is not None:
        for name in [wanted] if isinstance(wanted, str) else wanted:
            if wanted and name not in columns:
                raise UserError(f"{setting}={name}: {place} has no such column; it has {first_few(columns)}")
        return wanted or None
    found = [name for name in columns if name.lower() in USUAL_COLUMNS[setting].split()]
    if len(found) > 1:
        raise UserError(f"{place} has the columns {' and '.join(found)}: which is meant? Set {setting}")
    return found[0] if found else None


def find_label_columns(columns: Iterable[str], data: ConfigDict, place: str) -> list[str]:
    """The names of the columns with labels; UserError if there is none though other settings ask for labels."""
    found = find_column(columns, data, "data.label_column", place)
    if found is None and (data.label_kind or data.label_separator):
        asked = "data.label_kind" if data.label_kind else "data.label_separator"
        raise UserError(f"{asked}={data[asked[5:]]}, but which column of {place} has the labels? Set data.label_column")
    return [found] if isinstance(found, str) else list(found or ())


def take_apart(rows: Rows, data: ConfigDict) -> Parts:
    """Divides rows between training and evaluation, and encodes their labels. Raises UserError."""
    kind = kind_of(data, rows.labels) if rows.labels else "class"
    train, evaluation, notes = split_rows(rows, data, kind)
    learned = _encode(rows, kind, data, train) if len(train) else None
    tested = _encode(rows, kind, data, evaluation, learned and learned.class_names)
    for chosen, labels, purpose in ((train, learned, "learn from"), (evaluation, tested, "evaluate on")):
        notes += _describe_labels(rows, chosen, labels, purpose) if rows.labels and labels else []
    return Parts(rows, train, evaluation, learned, tested, notes)


def _encode(rows: Rows, kind: str, data: ConfigDict, chosen: np.ndarray, known: Sequence[str] | None = None) -> Labels:
    """The labels of the chosen rows. Names of classes begin with the `known` ones."""
    if not rows.labels:
        return Labels("class", None, np.full(len(chosen), -1, np.int64))
    columns = {name: [cells[row] for row in chosen] for name, cells in rows.labels.items()}
    return encode_labels(columns, kind, data, lambda place: rows.reader.where(int(chosen[place])), rows.schema, known)


def _describe_labels(rows: Rows, chosen: np.ndarray, labels: Labels, purpose: str) -> list[str]:
    """Notes on pictures without a label, and on classes without a picture."""
    values, names, notes = labels.values, labels.class_names or (), []
    without = values < 0 if labels.kind == "class" else np.isnan(values).any(1)
    if without.any():
        first = rows.reader.where(int(chosen[np.argmax(without)]))
        notes.append(f"pictures to {purpose} without a label: {without.sum():,}, the first in {first}")
    there = {*np.unique(values)} if labels.kind == "class" else {*np.flatnonzero((values == 1).any(0))}
    lacking = [name for number, name in enumerate(names) if number not in there]
    if lacking and labels.kind != "number":
        share = f"{len(lacking):,} of {len(names):,} classes"
        notes.append(f"no pictures to {purpose} for {share}: {first_few(lacking)}")
    return notes


def split_rows(rows: Rows, data: ConfigDict, kind: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Rows for training and evaluation, int64 [n] each, and notes for users. `kind`: of the labels.

    By the names in `rows.splits`, in the spellings of `find_splits`; without evaluation rows a share of the training
    rows is held out. With data.train_split='' all rows are for training that are not for evaluation or named like it.
    A picture without a group is a group by itself. UserError if a group would lie in both.
    """
    train, evaluation, notes = np.arange(len(rows.names)), None, []
    splits = each(rows.splits, text_of) if rows.splits is not None else [""] * len(rows.names)
    there = sorted({*splits} - {""})
    if data.train_split or data.eval_split:
        train, evaluation, notes = _by_name(rows, data, splits, there)
    groups = None if rows.groups is None else each(rows.groups, text_of)
    if evaluation is None:
        by_class = data.stratify and rows.labels and kind == "class"
        held = held_out(
            [rows.names[row] for row in train],
            data.eval_fraction,
            rows.place,
            each([next(iter(rows.labels.values()))[row] for row in train], text_of) if by_class else None,
            groups and [groups[row] or rows.names[row] for row in train],
        )
        return train[~held], train[held], notes
    if groups:
        places = {groups[row]: row for row in train if groups[row]}
        for row in evaluation:
            if (other := places.get(groups[row])) is not None:
                raise UserError(
                    f"the group {groups[row]} is for training in {rows.reader.where(int(other))} and for evaluation in "
                    f"{rows.reader.where(int(row))}: put it into one split, or set data.group_column=''"
                )
    return train, evaluation, notes


def _by_name(
    rows: Rows, data: ConfigDict, splits: list[str], there: list[str]
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """`split_rows` by the names of splits that are `there`; None without rows for evaluation."""
    train_name = find_name(there, "data.train_split", data.train_split, rows.place, "split")
    eval_name = find_name(there, "data.eval_split", data.eval_split, rows.place, "split")
    if not there:
        return np.arange(len(splits)), None, []
    if data.train_split and train_name == eval_name:
        why = "" if train_name is None else f", and {train_name} cannot be both for training and for evaluation"
        raise UserError(
            f"{rows.place}: its splits are {first_few(there)}{why}: set data.train_split and data.eval_split to two of "
            "these"
        )
    of_training = {train_name}
    if not data.train_split:
        of_training = {name for name in ("", *there) if name.lower() not in VALIDATION + TEST} - {eval_name}
    train, evaluation = (
        np.array([row for row, name in enumerate(splits) if name in names], np.int64)
        for names in (of_training, {eval_name})
    )
    unused = [name for name in there if name not in of_training | {eval_name}]
    notes = [f"splits that are not used: {first_few(unused)}"] if unused else []
    if "" in splits and "" not in of_training:
        first = rows.reader.where(splits.index(""))
        notes.append(f"pictures without a split, which are not used: {splits.count(''):,}, the first in {first}")
    return train, None if eval_name is None else evaluation, notes
