"""Labels from the cells of a table: one class of several, any of several, or numbers."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

from mae_jax.runtime.errors import UserError

T = TypeVar("T")
Cell = Any  # text, a number, a list of these, or None
Where = Callable[[int], str]  # the place of a row, for messages: "line 7 of labels.csv"
FLAGS = {"": np.nan, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}
FLOAT32_MAX = float(np.finfo(np.float32).max)


class Labels(NamedTuple):
    kind: str  # see `Source.label_kind`
    class_names: list[str] | None
    values: np.ndarray  # see `Source.labels`


def kind_of(data: ConfigDict, columns: Mapping[str, Sequence[Cell]]) -> str:
    """`data.label_kind`; if unset, class, or multi where a picture has several labels. UserError if they conflict."""
    types = {name: {*map(type, cells)} for name, cells in columns.items()}
    if structs := [name for name, found in types.items() if dict in found]:
        raise UserError(f"the column {structs[0]} holds structs, not labels: set data.label_column to another one")
    lists = [name for name, found in types.items() if found & {list, tuple}]
    several = bool(data.label_separator or lists or len(columns) > 1)
    kind = data.label_kind or ("multi" if several else "class")
    if several and kind == "class":
        cause = f"data.label_separator={data.label_separator!r}" if data.label_separator else f"{len(columns)} columns"
        cause = f"the lists in the column {lists[0]}" if lists else cause
        raise UserError(f"data.label_kind=class, but {cause} give a picture several labels: set data.label_kind=multi")
    if kind == "number" and (data.label_separator or lists):
        cause = f"data.label_separator={data.label_separator!r} is set"
        cause = f"the column {lists[0]} holds lists" if lists else cause
        raise UserError(f"data.label_kind=number takes one number from each data.label_column, but {cause}")
    if lists and len(columns) > 1:
        raise UserError(f"data.label_column={tuple(columns)}: {lists[0]} holds lists: name it alone")
    return kind


def encode_labels(
    columns: Mapping[str, Sequence[Cell]],
    kind: str,
    data: ConfigDict,
    where: Where,
    schema: Sequence[str] | None = None,
    known: Sequence[str] | None = None,
) -> Labels:
    """Labels of n rows from the cells of one or several columns. Raises UserError, with the row's place.

    Names of classes are the `known` ones, and then others in the cells: whole numbers in their order, else as text.
    With a `schema` of names, cells are places in it. Empty cells: no label.
    """
    if kind == "number" or len(columns) > 1:
        read = _numbers if kind == "number" else _flags
        return Labels(kind, list(columns), np.stack([read(*column, where) for column in columns.items()], 1))
    (cells,) = columns.values()
    if schema:
        cells, known = _named(cells, schema, where), known or schema
    if kind == "class":
        return _classes(cells, where, known, numbers=data.label_kind is None and not schema)
    return _several(cells, data.label_separator, known)


def each(cells: Sequence[Cell], value_of: Callable[[Cell], T]) -> list[T]:
    """The value of each cell, found once for those that are alike."""
    if any(isinstance(cell, list | dict) for cell in cells):
        return [*map(value_of, cells)]
    values = {cell: value_of(cell) for cell in set(cells)}
    return [values[cell] for cell in cells]


def text_of(cell: Cell) -> str:
    """A cell as text without surrounding blanks; "" if it is empty, or no number as pandas writes it to parquet."""
    if isinstance(cell, float):
        if np.isnan(cell):
            return ""
        cell = int(cell) if cell.is_integer() else cell  # integers of a column with empty cells
    return "" if cell is None else str(cell).strip()


def _named(cells: Sequence[Cell], schema: Sequence[str], where: Where) -> list[Cell]:
    """The names, or lists of names, that the cells, places in a schema, mean; None for Hugging Face's "no label"."""

    def name(place: int | None, row: int) -> str | None:
        if place is None or place == -1:
            return None
        if not (isinstance(place, int) and 0 <= place < len(schema)):
            raise UserError(f"{where(row)} has the label {place}, but there are {len(schema)} classes")
        return schema[place]

    return [
        [name(place, row) for place in cell] if isinstance(cell, list | tuple) else name(cell, row)
        for row, cell in enumerate(cells)
    ]


def _classes(cells: Sequence[Cell], where: Where, known: Sequence[str] | None, numbers: bool) -> Labels:
    """One class a picture. `numbers`: UserError if they are numbers, not all whole."""
    words = each(cells, text_of)
    found = {*words} - {""}
    odd = {text for text in found if not _is_whole(text)}
    if numbers and odd and all(_number(text) is not None for text in found):
        row = next(row for row, text in enumerate(words) if text in odd)
        raise UserError(
            f"{where(row)} has the label {words[row]}, which looks like a number to predict, not a class: set "
            "data.label_kind=number, or data.label_kind=class, or data.label_column to another column"
        )
    names = _names(found, known)
    place = {name: number for number, name in enumerate(names)} | {"": -1}
    return Labels("class", names or None, np.array([place[text] for text in words], np.int64))


def _several(cells: Sequence[Cell], separator: str | None, known: Sequence[str] | None) -> Labels:
    """Any of several classes a picture: those in a list, or between separators; none in [] or a separator alone."""

    def words_in(cell: Cell) -> list[str]:
        parts = cell if isinstance(cell, list | tuple) else [cell]
        texts = [text_of(part) for part in parts]
        if separator:
            texts = [part.strip() for text in texts for part in text.split(separator)]
        return [text for text in texts if text]

    words = [words_in(cell) for cell in cells]
    names = _names(set(chain.from_iterable(words)), known)
    place = {name: number for number, name in enumerate(names)}
    counts = np.array([len(found) for found in words], np.int64)
    values = np.zeros((len(words), len(names)), np.float32)
    values[np.repeat(np.arange(len(words)), counts), [place[text] for found in words for text in found]] = 1
    for row in np.flatnonzero(counts == 0):
        if cells[row] != [] and not (separator and text_of(cells[row])):
            values[row] = np.nan
    return Labels("multi", names, values)


def _names(found: set[str], known: Sequence[str] | None) -> list[str]:
    """Names of classes: the known ones, then others; of whole numbers in their order, else sorted as text."""
    more = found - set(known or ())
    numbers = all(map(_is_whole, more))
    return [*(known or ()), *sorted(more, key=lambda text: (float(text), text) if numbers else text)]


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+(\.0*)?", text) is not None


def _number(text: str) -> float | None:
    """The number that a text means, perhaps NaN, as an empty one does; None if it means none."""
    try:
        return float(text or "nan")
    except ValueError:
        return None


def _numbers(name: str, cells: Sequence[Cell], where: Where) -> np.ndarray:
    def number(cell: Cell) -> float | None:
        text = text_of(cell)
        found = _number(text)
        return found if not text or found is not None and abs(found) <= FLOAT32_MAX else None

    found = each(cells, number)
    if None in found:
        row = found.index(None)
        raise UserError(
            f"{where(row)}: {name} is {text_of(cells[row])!r}, not a finite number: correct it, or leave it empty"
        )
    return np.array(found, np.float32)


def _flags(name: str, cells: Sequence[Cell], where: Where) -> np.ndarray:
    found = each(cells, lambda cell: FLAGS.get(text_of(cell).lower()))
    if None in found:
        row = found.index(None)
        raise UserError(
            f"{where(row)}: {name} is {text_of(cells[row])!r}, but in each of several data.label_column 1, true or yes "
            "says that a class applies, and 0, false or no that it does not; for numbers, set data.label_kind=number"
        )
    return np.array(found, np.float32)
