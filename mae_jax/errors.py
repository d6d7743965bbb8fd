"""The exceptions whose messages are meant for the user's eyes, and what to say of those of others."""

import os
import re
import sys


class UserError(ValueError):
    """A mistake that the user can mend: the message names the value and the remedy, in one line.

    `main.py` prints the message without a traceback and exits with code 2.
    """


class NotSaved(RuntimeError):
    """What a run has come to cannot be written: the message says why and what to do, in one line.

    `main.py` prints the message without a traceback and exits with code 1.
    """


def complain(text: str) -> None:
    """Prints a line to standard error, in one piece: other threads and processes may write there at the same time."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason(error: Exception) -> str:
    """Why something could not be read or written: the system's words for it, if it is the system's error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore has it, which writes for Orbax
    return os.strerror(int(code[1])) if code else first_line(error)
