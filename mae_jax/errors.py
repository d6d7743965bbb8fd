"""The one exception type whose message is meant for the user's eyes."""


class UserError(ValueError):
    """A mistake that the user can mend: the message names the value and the remedy, in one line.

    `main.py` prints the message without a traceback and exits with code 2.
    """
