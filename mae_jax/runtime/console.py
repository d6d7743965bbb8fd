"""Console output that never ends a run, even if the terminal, pipe or file behind it fails."""

import contextlib
import io
import logging
import sys

from tqdm import tqdm

from mae_jax.runtime.errors import escaped
from mae_jax.runtime.processes import is_main

KEPT_BYTES = 2**16  # of output that could not be written


def say(*lines: str) -> None:
    """Prints lines in process 0, above any progress bar. Control characters, line breaks included, are escaped."""
    if is_main():
        with contextlib.suppress(OSError):
            tqdm.write("\n".join(map(escaped, lines)), file=sys.stdout)
            sys.stdout.flush()


def si(value: float) -> str:
    """A number with three digits and an SI prefix: 5.68e7 -> "56.8 M"."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"


class _Unfailing(io.FileIO):
    """A file descriptor whose writes never fail; each write first retries what could not be written before."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self._pending = bytearray()

    def write(self, data: memoryview) -> int:
        self._pending += data
        with contextlib.suppress(OSError):  # a full disk, a closed pipe, a lost terminal
            while self._pending and (written := super().write(self._pending)):
                del self._pending[:written]
        del self._pending[:-KEPT_BYTES]
        return len(data)


def keep_streams() -> None:
    """Replaces standard output and error, which must be open, by streams on which printing never raises."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old, raw = getattr(sys, name), _Unfailing(descriptor)
        encoding, at_once = getattr(old, "encoding", "utf-8"), name == "stderr" or raw.isatty()
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", None, at_once)
        setattr(sys, name, stream)
        for handler in logging.getLogger().handlers:  # of libraries
            if getattr(handler, "stream", None) is old:
                handler.setStream(stream)
