"""A table of picture files with their labels, splits and groups: `data.name=table`."""

import csv
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from mae_jax.data.files import check_exists, first_few, read_picture_file
from mae_jax.data.rows import USUAL_COLUMNS, Rows, RowSource, find_column, find_label_columns
from mae_jax.runtime.errors import UserError, first_line

DELIMITERS = ",;\t"
EXTENSIONS = (".csv", ".tsv", ".txt", ".parquet")


class Table(RowSource):
    """The files in a CSV, TSV or parquet table at `data.path`, relative to `data.root` or the table's folder.

    Columns are those of the settings `data.*_column`, or have usual names (`rows.USUAL_COLUMNS`). Raises UserError,
    with the line, for rows without a file, and for files that are missing or in several rows.
    """

    @classmethod
    def read_rows(cls, data: ConfigDict) -> Rows:
        path, place = _find_table(data.path), os.path.basename(data.path)
        names, column, lines = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)
        file_column = find_column(names, data, "data.image_column", place)
        if file_column is None:
            raise UserError(
                f"{path}: which of its columns ({first_few(names)}) has the files? None is one of "
                f"{USUAL_COLUMNS['data.image_column']}: set data.image_column (the first line names the columns)"
            )
        splits, groups = (
            name and column(name)
            for name in (find_column(names, data, f"data.{what}_column", place) for what in ("split", "group"))
        )
        labels = {name: column(name) for name in find_label_columns(names, data, place)}
        found = [str(name or "").strip() for name in column(file_column)]
        root = os.path.abspath(os.path.expanduser(data.root or path.parent))
        files = TableFiles(root, pa.array(found, pa.large_string()), lines, str(path))
        _check_files(files, found, file_column, [*labels.values(), *filter(None, (splits,))])
        return Rows(place, found, files, labels, None, splits, groups)


class TableFiles(NamedTuple):
    """The files of a table: the `Reader` of its rows."""

    root: str
    names: pa.Array  # not a list, which takes three times the memory and longer to copy to reader processes
    lines: np.ndarray | None  # int32 [n], of a text file; None: rows are counted
    table: str

    def read(self, row: int) -> bytes:
        return read_picture_file(self.path(row))

    def path(self, row: int) -> str:
        return os.path.join(self.root, self.names[row].as_py())

    def name(self, row: int) -> str:
        return f"{self.path(row)} ({self.where(row)})"

    def where(self, row: int) -> str:
        place = f"row {row + 1}" if self.lines is None else f"line {self.lines[row]}"
        return f"{place} of {self.table}"


def _find_table(path: str | None) -> Path:
    if not path:
        raise UserError("data.path is not set: a table needs it, e.g. --config.data.path=labels.csv")
    check_exists(path)
    if os.path.isdir(path):
        tables = [name for name in sorted(os.listdir(path)) if name.lower().endswith(EXTENSIONS)]
        found = f"it holds {first_few(tables)}" if tables else "it holds no table"
        raise UserError(f"data.path={path} is a folder, not a table; {found}: name a file, as labels.csv in it")
    if not path.lower().endswith(EXTENSIONS):
        raise UserError(f"data.path={path} is not a table: its name must end in one of {' '.join(EXTENSIONS)}")
    return Path(path)


def _read_parquet(path: Path) -> tuple[list[str], Callable[[str], list[Any]], None]:
    """As `_read_text`; the rows have no lines."""

    def column(name: str) -> list[Any]:
        kind = file.schema_arrow.field(name).type
        if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            raise UserError(f"data.path={path}: the column {name} has no text; data.name=parquet reads pictures in it")
        return file.read([name])[name].to_pylist()

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.path={path} cannot be read as parquet: {first_line(error)}") from error
    return file.schema_arrow.names, column, None


def _read_text(path: Path) -> tuple[list[str], Callable[[str], list[str]], np.ndarray]:
    """Names of the columns, a function: name -> cells of that column, and the line of each row."""
    rows, lines, line = [], [], 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(DELIMITERS, key=head.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in reader:
                if cells and rows and len(cells) != len(rows[0]):
                    raise UserError(
                        f"line {line} of {path} has {len(cells)} cells, but the first line names {len(rows[0])} "
                        "columns: correct it (a cell with a comma in it needs quotes)"
                    )
                if cells:
                    rows.append(cells)
                    lines.append(line)
                line = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        why = f"line {line} is no UTF-8 text in cells ({first_line(error)})"
        raise UserError(f"data.path={path}: {why}: correct it, or save the table anew") from error
    if len(rows) < 2:
        raise UserError(f"{path} has no rows below its first line, which names the columns")
    names = [name.strip() for name in rows.pop(0)]
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise UserError(f"{path} has several columns {twice[0]!r}: rename them")
    place = {name: number for number, name in enumerate(names)}
    return names, lambda name: [cells[place[name]] for cells in rows], np.array(lines[1:], np.int32)


def _check_files(files: TableFiles, names: list[str], column: str, facts: list[Sequence[Any]]) -> None:
    """Raises UserError for rows without a file, missing files, and files that two rows tell different `facts` of."""
    if empty := [files.where(row) for row, name in enumerate(names) if not name]:
        raise UserError(f"{len(empty):,} rows have no file in the column {column}: {first_few(empty)}")
    if len(files.names.unique()) < len(names):
        first: dict[str, int] = {}
        for row, name in enumerate(names):
            other = first.setdefault(name, row)
            if other != row:
                differ = any(fact[row] != fact[other] for fact in facts)
                what = "with other labels or in another split" if differ else "twice"
                raise UserError(f"{files.where(row)} names the file {name} of {files.where(other)} {what}: remove one")
    there: dict[str, set[str]] = {}
    missing = []
    for row, name in enumerate(names):  # a look into each folder is quicker than one at each file
        folder, base = os.path.split(os.path.join(files.root, name))
        if folder not in there:
            try:
                there[folder] = set(os.listdir(folder))
            except OSError:
                there[folder] = set()
        if base not in there[folder]:
            missing.append(f"{name} ({files.where(row)})")
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(names):,} files are not in {files.root}: {first_few(missing)}; set data.root to "
            "the folder that they are relative to, or remove these rows"
        )
