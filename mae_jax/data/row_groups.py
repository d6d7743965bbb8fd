"""Single pictures out of parquet files, whose rows are only accessible in groups."""

import errno
import mmap
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mae_jax.data.cache import cache_folder, entry_of, read_entry, write_bytes, write_entry
from mae_jax.runtime.errors import UserError, first_line, reason

BATCH = 64  # pictures in memory at once
CACHE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class Footer(NamedTuple):
    """What a parquet file tells of itself. The file is closed: a process may only have so many open."""

    schema: pa.Schema
    metadata: pq.FileMetaData


class RowGroups:
    """Pictures in a column of parquet files: the `Reader` of their rows.

    When the first picture of a row group is needed, the group is read through once. If its pictures lie in the file as
    they are (uncompressed, as Hugging Face's datasets writes them), their places are found and kept in the cache;
    otherwise the pictures are unpacked into the cache. From then on each is one read by offset.
    """

    def __init__(self, footers: dict[str, Footer], column: str):
        """`footers`: by path; the column holds bytes, or structs with `bytes`."""
        self._files, self._column = list(footers), column
        is_struct = pa.types.is_struct(next(iter(footers.values())).schema.field(column).type)
        self._leaf = f"{column}.bytes" if is_struct else column
        metadata = [file.metadata for file in footers.values()]
        groups = [(number, group) for number, facts in enumerate(metadata) for group in range(facts.num_row_groups)]
        self._groups = np.array(groups, np.int64).reshape(-1, 2)  # file, group in it
        self._starts = np.cumsum([0, *(metadata[number].row_group(group).num_rows for number, group in groups)])
        self._stamps = [_stamp(file) for file in self._files]
        self._forget()

    def _forget(self) -> None:
        self._found: dict[int, tuple[str, np.ndarray]] = {}  # see `_find`
        self._locks, self._lock = {}, threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_found", "_locks", "_lock")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget()

    def read(self, row: int) -> bytes:
        group = self._group_of(row)
        for _ in range(2):
            if group not in self._found:
                with self._lock:
                    lock = self._locks.setdefault(group, threading.Lock())
                with lock:  # the others wait for one
                    if group not in self._found:
                        self._found[group] = self._find(group)
            file, spans = self._found[group]
            start, size = map(int, spans[row - self._starts[group]])
            if not size:
                raise OSError(errno.EINVAL, "the row has no picture")
            try:
                with open(file, "rb") as opened:
                    opened.seek(start)
                    found = opened.read(size)
            except FileNotFoundError:
                self._found.pop(group, None)  # the cache has been emptied
            else:
                break
        else:
            raise FileNotFoundError(errno.ENOENT, "the file is gone", file)
        if len(found) < size:
            raise OSError(errno.EBADMSG, "the file is shorter than it was", file)
        return found

    def name(self, row: int) -> str:
        return self.where(row)

    def file(self, row: int) -> str:
        return self.name(row)

    def where(self, row: int) -> str:
        number = self._groups[self._group_of(row), 0]
        first = self._starts[np.searchsorted(self._groups[:, 0], number)]
        return f"row {row - first + 1} of {self._files[number]}"

    def check_room(self, footers: dict[str, Footer]) -> list[str]:
        """A note on the pictures that must be unpacked, if any; UserError if they do not fit into the cache."""
        place, size = cache_folder(), 0
        for group, (number, place_in_file) in enumerate(self._groups):
            facts = _chunk(footers[self._files[number]].metadata.row_group(int(place_in_file)), self._leaf)
            if facts.compression != "UNCOMPRESSED" and not self._unpacked(group).exists():
                size += facts.total_uncompressed_size
        if not size:
            return []
        try:
            place.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(place).free
            why = f"has room for {free / 2**20:,.0f} MiB" if free < size else ""
            why = why if os.access(place, os.W_OK) else "cannot be written"
        except OSError as error:
            why = f"cannot be made ({reason(error)})"
        if why:
            raise UserError(
                f"{self._files[0]}: its pictures are compressed once more, and need {size / 2**20:,.0f} MiB to be "
                f"unpacked, but the cache {place} {why}: set the environment variable XDG_CACHE_HOME to another folder"
            )
        return [f"pictures are unpacked as they are read, {size / 2**20:,.0f} MiB in all, into {place}"]

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, "right")) - 1

    def _entry(self, group: int) -> Path:
        number, place = map(int, self._groups[group])
        stamp = "-".join(map(str, self._stamps[number]))
        return entry_of("parquet", self._files[number], self._column) / f"{stamp}-{place:06d}"

    def _unpacked(self, group: int) -> Path:
        return self._entry(group).with_suffix(".pictures")

    def _find(self, group: int) -> tuple[str, np.ndarray]:
        """The file with a row group's pictures, and their offsets and sizes in it, int64 [n, 2]; size 0: none."""
        number, place = map(int, self._groups[group])
        file, entry, unpacked = self._files[number], self._entry(group), self._unpacked(group)
        if _stamp(file) != self._stamps[number]:
            raise OSError(errno.EBADMSG, "the file has changed since it was opened", file)
        kept = read_entry(entry)
        if kept and (kept["inside"] or unpacked.exists()):
            return (file if kept["inside"] else str(unpacked)), np.frombuffer(kept["spans"], np.int64).reshape(-1, 2)
        try:
            spans = self._look_inside(file, place)
            inside = spans is not None
            if not inside:
                sizes: list[int] = []
                _write_pictures(unpacked, self._cells(file, place), sizes)
                spans = np.stack([np.cumsum([0, *sizes[:-1]]), sizes], 1)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the disk's, not pyarrow's
                raise
            raise OSError(errno.EBADMSG, f"row group {place} is damaged: {first_line(error)}", file) from error
        write_entry(entry, {"inside": inside, "spans": spans.tobytes()})
        return (file if inside else str(unpacked)), spans

    def _cells(self, file: str, place: int) -> Iterator[bytes | None]:
        with pq.ParquetFile(file, buffer_size=2**20) as opened:  # else the whole group is read at once
            for batch in opened.iter_batches(BATCH, [place], [self._leaf], use_threads=False):
                cells = batch.column(0)
                yield from (pc.struct_field(cells, "bytes") if self._leaf != self._column else cells).to_pylist()

    def _look_inside(self, file: str, place: int) -> np.ndarray | None:
        """`_find`'s offsets and sizes in the parquet file itself; None if the pictures do not lie in it as they are."""
        with pq.ParquetFile(file) as opened:
            facts = _chunk(opened.metadata.row_group(place), self._leaf)
        if facts.compression != "UNCOMPRESSED":
            return None
        first = facts.dictionary_page_offset or facts.data_page_offset
        last, at, spans = first + facts.total_compressed_size, first, []
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for cell in self._cells(file, place):
                if cell:
                    # In the rows' order, each soon after the one before; but a dictionary has repeated ones only once.
                    start = content.find(cell, at, last)
                    start = content.find(cell, first, last) if start < 0 else start
                    if start < 0:
                        return None
                    at = max(at, start + len(cell))
                spans.append((start, len(cell)) if cell else (0, 0))
        return np.array(spans, np.int64).reshape(-1, 2)


def _write_pictures(path: Path, cells: Iterator[bytes | None], sizes: list[int]) -> None:
    def parts() -> Iterator[bytes]:
        for cell in cells:
            sizes.append(len(cell or b""))
            yield cell or b""

    try:
        write_bytes(path, parts())
        for old in path.parent.glob("*.pictures"):  # of the file as it was before it changed
            if old.name[: old.name.rindex("-")] != path.name[: path.name.rindex("-")]:
                old.unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in CACHE_FAULTS:
            raise
        raise UserError(
            f"pictures cannot be unpacked into the cache {path.parent}: {reason(error)}: make room, or set the "
            "environment variable XDG_CACHE_HOME to another folder"
        ) from error


def _stamp(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _chunk(group: pq.RowGroupMetaData, leaf: str) -> pq.ColumnChunkMetaData:
    """The part of a row group that holds a column's values."""
    chunks = map(group.column, range(group.num_columns))
    return next(chunk for chunk in chunks if chunk.path_in_schema == leaf)
