"""A table of picture files with their labels, splits and groups: `data.name=table`."""

import contextlib
import csv
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from mae_jax.data.files import check_exists, first_few, read_picture_file
from mae_jax.data.rows import USUAL_COLUMNS, Rows, RowSource, find_column, find_label_columns
from mae_jax.runtime.errors import UserError, first_line, reason

DELIMITERS = ",;\t"
EXTENSIONS = (".csv", ".tsv", ".txt", ".parquet")
FEW = 100  # files of a folder up to which each is looked for, rather than in a list of what is there


class Table(RowSource):
    """The files in a CSV, TSV or parquet table at `data.path`, relative to `data.root` or the table's folder.

    Columns are those of the settings `data.*_column`, or have usual names (`rows.USUAL_COLUMNS`). Raises UserError,
    with the line, for rows without a file, and for files that are missing or in several rows.
    """

    @classmethod
    def read_rows(cls, data: ConfigDict) -> Rows:
        path, place = _find_table(data.path), os.path.basename(data.path)
        names, column, lines = _read_columns(path)
        file_column = find_column(names, data, "data.image_column", place)
        if file_column is None:
            raise UserError(
                f"{path}: which of its columns ({first_few(names)}) has the files? None is one of "
                f"{USUAL_COLUMNS['data.image_column']}: set data.image_column"
            )
        by_setting = [find_column(names, data, f"data.{kind}_column", place) for kind in ("split", "group")]
        splits, groups = (None if name is None else column(name) for name in by_setting)
        labels = {name: column(name) for name in find_label_columns(names, data, place)}
        root = os.path.abspath(data.root or os.path.dirname(path))
        pictures = [str(cell).strip() if cell else "" for cell in column(file_column)]
        if any("./" in name or "//" in name for name in pictures):  # of one file there must be one name
            pictures = [name and os.path.normpath(name) for name in pictures]
        files = TableFiles(root, pa.array(pictures, pa.large_string()), lines, str(path))
        _check_files(files, pictures, file_column, [*labels.values(), *([splits] if splits else [])])
        return Rows(place, pictures, files, labels, None, splits, groups)

    def places(self) -> list[str]:
        return [self._reader.file(int(row)) for row in self._rows]


class TableFiles(NamedTuple):
    """The files of a table: the `Reader` of its rows."""

    root: str
    names: pa.Array  # not a list, which takes three times the memory and longer to copy to reader processes
    lines: np.ndarray | None  # int32 [n], of a text file; None: rows are counted
    table: str

    def read(self, row: int) -> bytes:
        return read_picture_file(self.file(row))

    def file(self, row: int) -> str:
        return os.path.join(self.root, self.names[row].as_py())

    def name(self, row: int) -> str:
        return f"{self.file(row)} ({self.where(row)})"

    def where(self, row: int) -> str:
        place = f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"
        return f"{place} of {self.table}"


def _find_table(path: str | None) -> Path:
    if not path:
        raise UserError("data.path is not set: a table needs it, e.g. --config.data.path=labels.csv")
    check_exists(path)
    if os.path.isdir(path):
        tables = [name for name in sorted(os.listdir(path)) if name.lower().endswith(EXTENSIONS)]
        found = f"it holds {first_few(tables)}: name one of them" if tables else "it holds none"
        raise UserError(f"data.path={path} is a folder, not a table, and {found}")
    if not path.lower().endswith(EXTENSIONS):
        raise UserError(f"data.path={path} is not a table: its name must end in one of {' '.join(EXTENSIONS)}")
    return Path(path)


def _read_columns(path: Path) -> tuple[list[str], Callable[[str], Sequence[Any]], np.ndarray | None]:
    """Names of the columns, a function from a name to the cells, and the line of each row; None if it has no lines."""
    if path.suffix.lower() == ".parquet":
        try:
            file = pq.ParquetFile(path)
            if file.metadata.num_rows == 0:
                raise UserError(f"{path} has no rows")
            return file.schema_arrow.names, lambda name: _read_column(file, name, path), None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"data.path={path} cannot be read as parquet: {first_line(error)}") from error
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            names, cells, lines = _read_text(file, path)
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"data.path={path} cannot be read: {reason(error)}; save it as UTF-8 text") from error
    return names, lambda name: cells[names.index(name) :: len(names)], lines


def _read_column(file: pq.ParquetFile, name: str, path: Path) -> list[Any]:
    if "binary" in str(file.schema_arrow.field(name).type):  # or a struct of bytes and path
        raise UserError(f"{path}: the column {name} holds bytes, not names: data.name=parquet reads pictures in a file")
    try:
        return file.read([name])[name].to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: the column {name} is damaged ({first_line(error)}): write it again") from error


def _read_text(file: TextIO, path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Names of the columns, the cells row by row, and the line of each row, int32 [n]. Empty lines are left out."""
    head = file.readline()
    file.seek(0)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(DELIMITERS, key=head.count)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    cells, lines, line = [], [], 1
    try:
        names = [name.strip() for name in next(reader, [])]
        if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
            raise UserError(f"{path} has several columns {twice[0]!r}: rename them")
        line = reader.line_num + 1
        for row in reader:
            if len(row) == len(names):
                cells += row  # one list: a million small ones would keep the garbage collector busy
                lines.append(line)
            elif row:
                raise UserError(
                    f"line {line} of {path} has {len(row)} cells, but the first line names {len(names)} columns: "
                    f"correct it (a cell with {delimiter!r} in it needs quotes)"
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"line {line} of {path} cannot be read: {first_line(error)}: correct its quotes") from error
    if not lines:
        raise UserError(f"{path} has no rows below its first line, which names the columns")
    return names, cells, np.array(lines, np.int32)


def _check_files(files: TableFiles, names: list[str], column: str, facts: list[Sequence[Any]]) -> None:
    """Raises UserError for rows without a file, missing files, and files in two rows, which may differ in `facts`."""
    if "" in names:
        empty = [files.where(row) for row, name in enumerate(names) if not name]
        share = f"{len(empty):,} of {len(names):,} rows"
        raise UserError(f"the column {column} is empty in {share}: {first_few(empty)}: name a file, or remove the row")
    if len({*names}) < len(names):
        first: dict[str, int] = {}
        row, other = next((row, first[name]) for row, name in enumerate(names) if first.setdefault(name, row) != row)
        differ = any(fact[row] != fact[other] for fact in facts)
        what = "with another label or in another split" if differ else "twice"
        raise UserError(f"{files.where(row)} names the file {names[row]} of {files.where(other)} {what}: remove one")
    rows_in = defaultdict(list)
    for row, name in enumerate(names):
        base = name.rpartition("/")[2]
        rows_in[name.removesuffix(base)].append((row, base))
    missing = []
    for folder, rows in rows_in.items():
        path = os.path.join(files.root, folder)
        there = set()
        if len(rows) > FEW:
            with contextlib.suppress(OSError):
                there = set(os.listdir(path))
        # Names that differ in the spelling of accents open the same file on some file systems.
        missing += [row for row, base in rows if base not in there and not os.path.exists(path + base)]
    if missing:
        first = first_few([f"{names[row]} ({files.where(row)})" for row in sorted(missing)])
        raise UserError(
            f"{len(missing):,} of {len(names):,} files are not in {files.root}: {first}; set data.root to the folder "
            "that they are relative to, or remove these rows"
        )
