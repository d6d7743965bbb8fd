"""Quiet: what Orbax and TensorStore print of errors that they raise too, and of waits that a run tells at its end."""

import functools
import logging
import sys
import warnings
from collections.abc import Callable


def silence_orbax() -> None:
    """Drops what a save in the background prints when it fails or takes long; from then on, in the whole program."""
    logger = logging.getLogger("absl")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
        logging.getLogger("asyncio").addFilter(_is_news)  # of the writes that were still under way
        warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)  # and of others
        sys.unraisablehook = functools.partial(_report, sys.unraisablehook)


def _is_news(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        return "exception was never retrieved" not in record.getMessage()
    known = record.exc_info or "Waiting for previous save" in record.getMessage()
    return not (known and "orbax" in record.pathname)


def _report(report: Callable, unraisable) -> None:
    """As sys.unraisablehook, but not for what TensorStore's threads tell a save that has ended by another's error."""
    if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
        report(unraisable)
