"""The exceptions whose messages are meant for the user's eyes, and what to say of those of others."""

import os
import re
import sys
import unicodedata

# Control characters (ESC, line breaks), format characters (such as those that reverse the text), lone surrogates.
ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # format characters that several languages and emoji need


def escaped(text: str) -> str:
    """The text as one line without control characters: they are escaped as in Python, such as \\n or \\x1b.

    Bytes of a file name that are not UTF-8, for which Python has lone surrogates, are shown as \\xff.
    """
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
    """A mistake that the user can mend: the message names the value and the remedy, in one line.

    `main.py` prints the message without a traceback and exits with code 2.
    """


class NotSaved(_OneLine, RuntimeError):
    """What a run has come to cannot be written: the message says why and what to do, in one line.

    `main.py` prints the message without a traceback and exits with code 1.
    """


def complain(text: str) -> None:
    """Prints a line to standard error, in one piece: other threads and processes may write there at the same time."""
    sys.stderr.write(escaped(text) + "\n")
    sys.stderr.flush()


def out_of_memory(error: BaseException, *, trains: bool) -> str | None:
    """What to tell the user of an error that means that memory ran out, on the host or a device; None of any other.

    Args:
      trains: whether the task trains, and does not only measure.
    """
    if not (isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        return None
    training = "a smaller data.batch_size, more train.accumulate_steps or model.remat=True; in an evaluation, "
    remedy = f"{training if trains else ''}a smaller evaluate.batch_size"
    return f"out of memory ({first_line(error).rstrip('.')}); try {remedy}"


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reason(error: Exception) -> str:
    """Why something could not be read or written: the system's words for it, if it is the system's error."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as TensorStore has it, which writes for Orbax
    return os.strerror(int(code[1])) if code else first_line(error)
