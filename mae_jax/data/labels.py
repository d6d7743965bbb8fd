"""Labels from the cells of a table: one class of several, any of several, or numbers."""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import FLOAT32_MAX

Cell = Any  # text, a number, a list of these, or None
Columns = dict[str, Sequence[Cell]]
Where = Callable[[int], str]  # the place of a row, for messages: "line 7 of labels.csv"

FLAGS = {"": np.nan, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}  # and numbers
WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


class Labels(NamedTuple):
    """Labels of n rows."""

    kind: str  # see `Source.label_kind`
    class_names: list[str] | None
    values: np.ndarray  # see `Source.labels`
    given: bool = True  # whether the names are given, as those of columns are; else they are found in the rows

    def take(self, rows: np.ndarray, known: Sequence[str] = ()) -> "Labels":
        """The labels of some rows. Names that are found are the `known` ones, and then others in these rows."""
        values = self.values[rows]
        if self.given:
            return self._replace(values=values)
        there = np.unique(values[values >= 0]) if self.kind == "class" else np.flatnonzero(np.nansum(values, axis=0))
        names = [*dict.fromkeys([*known, *(self.class_names[place] for place in there)])]
        if names == self.class_names:
            return self._replace(values=values)
        place = {name: number for number, name in enumerate(self.class_names)}
        places = [place[name] for name in names]
        if self.kind == "multi":
            return self._replace(class_names=names, values=values[:, places])
        new = np.full(len(place) + 1, -1)  # -1 stays -1
        new[places] = np.arange(len(names))
        return self._replace(class_names=names or None, values=new[values])


def encode_labels(columns: Columns, data: ConfigDict, where: Where, schema: Sequence[str] | None = None) -> Labels:
    """Labels of n rows from the cells of one or several columns. Raises UserError, with the row's place.

    Names of classes are those of the `schema`, in which cells are places; or of several columns; or those found in the
    cells, whole numbers in their order, else sorted as text.
    """
    kind = _find_kind(columns, data)
    if kind == "number" or len(columns) > 1:
        read = _numbers if kind == "number" else _flags
        return Labels(kind, list(columns), np.stack([read(*column, where) for column in columns.items()], 1))
    (cells,) = columns.values()
    parts, rows = cells, np.arange(len(cells))
    if kind == "multi":
        several = [_parts(cell, data.label_separator) for cell in cells]
        parts, rows = [*itertools.chain(*several)], np.repeat(rows, [*map(len, several)])
    texts = [_named(part, schema, where, int(row)) for row, part in zip(rows, parts, strict=True)] if schema else (
        [*map(text_of, parts)]
    )  # fmt: skip
    place = {name: number for number, name in enumerate(schema or ())}
    codes = np.fromiter((place.setdefault(text, len(place)) if text else -1 for text in texts), np.int64, len(texts))
    names = [*place]
    if not schema:
        if kind == "class" and data.label_kind is None:
            _check_classes(names, codes, where)
        order = _order(names)
        names, codes = [names[number] for number in order], np.append(np.argsort(order), -1)[codes]
    if kind == "class":
        return Labels(kind, names or None, codes, bool(schema or not names))
    values = np.zeros((len(cells), len(names)), np.float32)
    values[rows[codes >= 0], codes[codes >= 0]] = 1
    # An empty list, or a separator alone, says that no class applies.
    unknown = (not isinstance(cell, list | tuple) and not text_of(cell) for cell in cells)
    values[np.fromiter(unknown, bool, len(cells))] = np.nan
    return Labels(kind, names, values, bool(schema))


def text_of(cell: Cell) -> str:
    """A cell as text without spaces around it, the same for a number of any type; "" if it is empty."""
    if isinstance(cell, float | np.floating):  # integers of a column with empty cells, too
        cell = int(cell) if cell.is_integer() else None if np.isnan(cell) else cell
    return "" if cell is None else str(cell).strip()


def _find_kind(columns: Columns, data: ConfigDict) -> str:
    """`data.label_kind`; if unset, class, or multi where a picture has several labels. UserError if they conflict."""
    why = f"data.label_column={tuple(columns)}" if len(columns) > 1 else None
    if any(isinstance(cell, list | tuple) for cell in next(iter(columns.values()))):
        why = f"lists in the column {next(iter(columns))}"
    if data.label_separator:
        why = f"data.label_separator={data.label_separator!r}"
    kind = data.label_kind or ("multi" if why else "class")
    if kind == "class" and why:
        raise UserError(f"data.label_kind=class, but {why} would give a picture several labels: set one of them only")
    if kind == "number" and why and len(columns) == 1:
        raise UserError(f"data.label_kind=number takes one number from a cell, but {why} would give several")
    return kind


def _parts(cell: Cell, separator: str | None) -> Sequence[Cell]:
    if isinstance(cell, list | tuple):
        return cell
    return text_of(cell).split(separator) if separator else [cell]


def _named(place: int | None, schema: Sequence[str], where: Where, row: int) -> str:
    if place is None or place == -1:  # Hugging Face's "no label"
        return ""
    if place not in range(len(schema)):
        raise UserError(f"{where(row)} has the label {place}, but there are {len(schema)} classes")
    return schema[place]


def _check_classes(names: list[str], codes: np.ndarray, where: Where) -> None:
    """Raises UserError if names of classes are rather measured numbers."""
    numbers = [*map(_number, names)]
    fraction = next((code for code, x in enumerate(numbers) if x is not None and np.isfinite(x) and x % 1), None)
    if fraction is not None and None not in numbers:
        raise UserError(
            f"{where(int(np.argmax(codes == fraction)))} has the label {names[fraction]}, a number to predict rather "
            "than a class: set data.label_kind to number (or to class), or data.label_column to the column of classes"
        )


def _order(names: list[str]) -> list[int]:
    """The places of the names in their order: whole numbers by value, others as text."""
    whole = all(map(WHOLE.fullmatch, names))
    return sorted(range(len(names)), key=lambda place: (float(names[place]) if whole else 0, names[place]))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers(name: str, cells: Sequence[Cell], where: Where) -> np.ndarray:
    values = np.full(len(cells), np.nan, np.float32)
    for row, text in enumerate(map(text_of, cells)):
        if text:
            number = _number(text)
            if number is None or not abs(number) < FLOAT32_MAX:
                raise UserError(f"{where(row)}: {name} is {text!r}, which is no number: correct it, or leave it empty")
            values[row] = number
    return values


def _flags(name: str, cells: Sequence[Cell], where: Where) -> np.ndarray:
    values = np.empty(len(cells), np.float32)
    for row, text in enumerate(map(text_of, cells)):
        flag = FLAGS.get(text.lower(), _number(text))
        if text and flag not in (0, 1):
            raise UserError(
                f"{where(row)}: {name} is {text!r}, but of several data.label_column each is 0 or 1 (or false or true, "
                "no or yes): correct it, or set data.label_kind=number"
            )
        values[row] = flag
    return values
