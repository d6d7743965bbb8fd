"""Files of pictures, read without waiting and no further than a picture can reach."""

import errno
import os
import stat
from pathlib import Path

MAX_BYTES = 2**30  # of a file: 6 for each of the most pixels that Pillow decodes


def read_picture_file(path: str | Path) -> bytes:
    """All of a file.

    Raises:
      OSError: it cannot be read, is a FIFO or a device, or has more than MAX_BYTES.
    """
    with open(path, "rb", opener=_open_without_waiting) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > MAX_BYTES:
            raise OSError(errno.EINVAL, f"it has {status.st_size:,} bytes, more than {MAX_BYTES:,}", str(path))
        return stream.read(status.st_size)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a FIFO would wait for a writer
