"""Lines for the person who watches a run; a terminal, pipe or file that fails does not end the run."""

import contextlib
import io
import logging
import sys

from tqdm import tqdm

from mae_jax.runtime.errors import escaped
from mae_jax.runtime.processes import is_main

KEPT_BYTES = 2**16  # of what could not be written


def say(*lines: str) -> None:
    """Prints lines, above the progress bar if there is one; only process 0 does.

    Control characters are escaped (`escaped`), line breaks too: inside a line they can only be part of a name.
    """
    if is_main():
        with contextlib.suppress(OSError):
            tqdm.write("\n".join(map(escaped, lines)), file=sys.stdout)
            sys.stdout.flush()


class _Unfailing(io.FileIO):
    """A descriptor whose writes never fail. What it cannot write is tried again with the next write."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self._waiting = bytearray()

    def write(self, data: memoryview) -> int:
        self._waiting += data
        with contextlib.suppress(OSError):  # a full disk; a reader or a terminal that is gone
            while self._waiting and (written := super().write(self._waiting)):
                del self._waiting[:written]
        del self._waiting[:-KEPT_BYTES]
        return len(data)


def keep_streams() -> None:
    """Makes sure that printing, by our code or by libraries, never ends the program, whatever happens to the output.

    Descriptors 1 and 2 must be open. Characters that the encoding lacks are escaped.
    """
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        encoding = getattr(old, "encoding", "utf-8")
        raw = _Unfailing(descriptor)
        by_lines = name == "stderr" or raw.isatty()
        buffered = io.BufferedWriter(raw)
        stream = io.TextIOWrapper(buffered, encoding, errors="backslashreplace", line_buffering=by_lines)
        setattr(sys, name, stream)
        for handler in logging.getLogger().handlers:  # of libraries
            if getattr(handler, "stream", None) is old:
                handler.setStream(stream)
