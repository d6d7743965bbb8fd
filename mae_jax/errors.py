"""The one exception type whose message is meant for the user's eyes."""


class UserError(ValueError):
    """A mistake that the user can mend: the message names the value and the remedy, in one line.

    `main.py` prints the message without a traceback and exits with code 2.
    """


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
