"""Lines for the person who watches a run."""

import contextlib
import sys

from tqdm import tqdm

from mae_jax.processes import is_main


def say(text: str) -> None:
    """Prints a line, above the progress bar if there is one; only process 0 does."""
    if is_main():
        with contextlib.suppress(
            OSError
        ):  # often a file on the disk that is full; Python keeps the line and tries again
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
