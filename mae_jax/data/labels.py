"""Labels from the cells of a table: one class of several, any of several, or numbers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import first_few
from mae_jax.runtime.errors import UserError

Cell = Any  # text, a number, a list of these, or None
Where = Callable[[int], str]  # the place of a row, for messages: "line 7 of labels.csv"


class Labels(NamedTuple):
    kind: str  # see `Source.label_kind`
    class_names: list[str] | None
    values: np.ndarray  # see `Source.labels`


def kind_of(data: ConfigDict, columns: Sequence[str], lists: bool = False) -> str:
    """`data.label_kind`; if unset, class, or multi where a picture has several labels. UserError if they conflict."""
    several = bool(data.label_separator) or len(columns) > 1 or lists
    kind = data.label_kind or ("multi" if several else "class")
    if kind == "class" and several:
        cause = f"data.label_separator={data.label_separator!r}" if data.label_separator else f"{len(columns)} columns"
        raise UserError(f"data.label_kind=class, but {cause if not lists else 'lists'} give a picture several labels")
    if kind == "number" and (data.label_separator or lists):
        raise UserError(f"data.label_kind=number takes one number from each of data.label_column={tuple(columns)}")
    return kind


def encode_labels(
    columns: dict[str, Sequence[Cell]],
    data: ConfigDict,
    where: Where,
    schema: Sequence[str] | None = None,
    known: Sequence[str] | None = None,
) -> Labels:
    """Labels of n rows from the cells of one or several columns. Raises UserError, with the row's place.

    Names of classes are the `known` ones, and then others in the cells: whole numbers in their order, else as text.
    With a `schema` of names, cells are places in it.
    """
    cells, *others = columns.values()
    lists = any(isinstance(cell, list | tuple) for cell in cells[:100])
    kind = kind_of(data, list(columns), lists)
    if kind == "number":
        numbers = [_numbers(name, column, where) for name, column in columns.items()]
        return Labels(kind, list(columns), np.stack(numbers, 1))
    if others:  # a column for each class
        places = [_flags(name, column, where) for name, column in columns.items()]
        return Labels(kind, list(columns), np.stack(places, 1))
    if schema:
        known, several = known or schema, [cell if isinstance(cell, list | tuple) else [cell] for cell in cells]
        several = [[_named(place, schema, where, row) for place in cell] for row, cell in enumerate(several)]
        cells = several if lists else [cell for (cell,) in several]
    if kind == "class":
        return _classes(cells, where, known)
    if data.label_separator:
        cells = [_text(cell).split(data.label_separator) for cell in cells]
    words = [
        [text for text in map(_text, cell if isinstance(cell, list | tuple) else [cell]) if text] for cell in cells
    ]
    names = _names({text for cell in words for text in cell}, known)
    place = {name: number for number, name in enumerate(names)}
    values = np.zeros((len(words), len(names)), np.float32)
    for row, cell in enumerate(words):
        values[row, [place[text] for text in cell]] = 1
        if not cell:
            values[row] = np.nan
    return Labels(kind, names, values)


def _named(place: int | None, schema: Sequence[str], where: Where, row: int) -> str | None:
    if place is None or place == -1:  # Hugging Face's "no label"
        return None
    if not 0 <= place < len(schema):
        raise UserError(f"{where(row)} has the label {place}, but there are {len(schema)} classes")
    return schema[place]


def _classes(cells: Sequence[Cell], where: Where, known: Sequence[str] | None) -> Labels:
    words = [_text(cell) for cell in cells]
    found = {text for text in words if text}
    row = next((row for row, text in enumerate(words) if text and _is_fraction(text)), None)
    if row is not None and all(_number(text) is not None for text in found):
        raise UserError(
            f"{where(row)} has the label {words[row]}, a number to predict rather than a class: set "
            "data.label_kind=number (or data.label_column to the column of the classes)"
        )
    names = _names(found, known)
    place = {name: number for number, name in enumerate(names)} | {"": -1}
    return Labels("class", names or None, np.fromiter((place[text] for text in words), np.int64, len(words)))


def _names(found: set[str], known: Sequence[str] | None) -> list[str]:
    """Names of classes: the known ones, then others; of whole numbers in their order, else sorted as text."""
    more = found - set(known or ())
    numbers = all(text.lstrip("+-").isdecimal() for text in more)
    return [*(known or ()), *sorted(more, key=lambda text: (int(text), text) if numbers else text)]


def _text(cell: Cell) -> str:
    if isinstance(cell, float | np.floating) and float(cell).is_integer():
        cell = int(cell)  # integers of a column with empty cells
    if cell is None or isinstance(cell, float | np.floating) and np.isnan(cell):
        return ""
    return str(cell).strip()


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_fraction(text: str) -> bool:
    number = _number(text)
    return number is not None and not (np.isfinite(number) and number.is_integer())


def _numbers(name: str, cells: Sequence[Cell], where: Where) -> np.ndarray:
    values = np.full(len(cells), np.nan, np.float32)
    for row, text in enumerate(map(_text, cells)):
        if text:
            number = _number(text)
            if number is None or not np.isfinite(np.float32(number)):
                raise UserError(f"{where(row)}: {name} is {text!r}, which is no number: correct it, or leave it empty")
            values[row] = number
    return values


def _flags(name: str, cells: Sequence[Cell], where: Where) -> np.ndarray:
    flags = {"": np.nan, "0": 0, "1": 1, "false": 0, "true": 1, "no": 0, "yes": 1}
    values = np.empty(len(cells), np.float32)
    for row, text in enumerate(map(_text, cells)):
        if text.lower() not in flags:
            raise UserError(
                f"{where(row)}: {name} is {text!r}; of several data.label_column each is 0 or 1 (true or false), or "
                f"set data.label_kind=number: {first_few(sorted(flags)[1:])} are read"
            )
        values[row] = flags[text.lower()]
    return values
