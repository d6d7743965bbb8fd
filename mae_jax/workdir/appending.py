"""Files that grow by whole lines or records, also on a disk that is full for a while."""

import collections
import contextlib
import os
from pathlib import Path

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import reason
from mae_jax.runtime.processes import is_main


class Appender:
    """Appends to a file, which it creates. What cannot be written is kept in memory and written, in order, later.

    Both are told, once. What is in the file is whole at any time. Nothing is written through a link.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: int | None = None  # opened when there is something to write
        self._length = path.stat().st_size if path.exists() else 0  # of what is whole
        self._waiting: collections.deque[bytes] = collections.deque()
        self._in_trouble = False

    def append(self, piece: bytes) -> None:
        """Writes those that are waiting and a further piece, each whole or not at all. Never raises an OSError."""
        self._waiting.append(piece)
        self._try()

    def _try(self) -> None:
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._in_trouble:
                say(f"{self._path} cannot be written: {reason(error)}; the run goes on and writes it when it can")
            self._in_trouble = True
        else:
            if self._in_trouble:
                say(f"{self._path} can be written again, and is complete")
            self._in_trouble = False

    def _write(self, piece: bytes) -> None:
        try:
            done = 0
            while done < len(piece):
                done += os.pwrite(self._file, piece[done:], self._length + done)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._length)  # no half piece stays
            raise
        self._length += len(piece)

    def close(self) -> None:
        """Tries to write what is waiting, tells what is lost, and closes the file."""
        if self._waiting:
            self._try()
        if self._waiting:
            say(f"{self._path} lacks the last {len(self._waiting)} entries: it could not be written")
            self._waiting.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None


class _EventFile:
    """An event file of TensorBoard as tensorboardX wants it, whose thread ends for good at the first error."""

    def __init__(self, path: str):
        self._appender = Appender(Path(path))
        self._records = bytearray()

    def write(self, data: bytes) -> None:
        self._records += data

    def flush(self) -> None:
        if self._records:
            self._appender.append(bytes(self._records))
            self._records.clear()

    def close(self) -> None:
        self.flush()
        self._appender.close()


class _EventFiles:
    """What tensorboardX opens files through whose path begins with the prefix."""

    prefix = "mae_jax"

    def directory_check(self, path: str) -> None:
        """The folder is there."""

    def open(self, path: str) -> _EventFile:
        return _EventFile(path.removeprefix(f"{self.prefix}:"))


def make_summary_writer(workdir: Path, purge_step: int):
    """A tensorboardX.SummaryWriter into a folder that a full disk does not stop; only process 0's writes."""
    from tensorboardX import SummaryWriter, record_writer

    record_writer.register_writer_factory(_EventFiles.prefix, _EventFiles())
    return SummaryWriter(
        f"{_EventFiles.prefix}:{workdir}", purge_step=purge_step, flush_secs=10, write_to_disk=is_main()
    )
