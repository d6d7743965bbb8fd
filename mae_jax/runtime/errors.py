"""Errors in one line, those of libraries and the system too, and reads that survive transient ones."""

import errno
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Control characters (ESC, line breaks), format characters (some reverse text), lone surrogates, separators.
ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # format characters that several languages and emoji need

PAUSES = (0.05, 0.15, 0.4, 1.4)  # seconds before each further try of a read: most faults are transient
LASTING = (
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
    errno.EINVAL, errno.EBADMSG, errno.ENXIO, errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP,
)  # fmt: skip


def escaped(text: str) -> str:
    """The text as one line: control characters are escaped as in Python, bytes that are not UTF-8 as \\xff."""
    return text if text.isprintable() else "".join(map(_escape, text))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character in JOINERS or unicodedata.category(character) not in ESCAPED_CATEGORIES:
        return character
    return character.encode("unicode_escape").decode()


class _OneLine(Exception):
    def __str__(self) -> str:
        return escaped(super().__str__())


class UserError(_OneLine, ValueError):
    """A mistake of the user. The message names value and remedy; `main.py` prints only the message and exits with 2."""


class NotSaved(_OneLine, RuntimeError):
    """A failure to write results. The message names cause and remedy; `main.py` prints only it and exits with 1."""


def complain(text: str) -> None:
    """Writes a line to standard error in one piece, since other processes may write there at the same time."""
    sys.stderr.write(escaped(text) + "\n")
    sys.stderr.flush()


def out_of_memory(error: BaseException, *, trains: bool) -> str | None:
    """The message if a host or device is out of memory; None for other errors. `trains`: whether the task trains."""
    if not (isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        return None
    training = "a smaller data.batch_size, more train.accumulate_steps or model.remat=True; in an evaluation, "
    remedy = f"{training if trains else ''}a smaller evaluate.batch_size"
    return f"out of memory ({first_line(error).rstrip('.')}); try {remedy}"


def first_line(error: BaseException) -> str:
    """An error's first line, or its type's name if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason(error: Exception) -> str:
    """Why reading or writing failed: the system's text for an OSError, otherwise the message's first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore, which writes for Orbax
    return os.strerror(int(code[1])) if code else first_line(error)


def with_patience(read: Callable[[], T]) -> T:
    """The value of `read()`, retried after a transient OSError (EIO, ESTALE, ETIMEDOUT, ...), but not a LASTING one."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if error.errno in LASTING:
                raise
        time.sleep(pause)
    return read()
