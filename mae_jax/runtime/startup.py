"""How long a start takes, from the beginning of the program to the end of its first step, and a cache to shorten it."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax


class Startup:
    """A stopwatch for the phases of a start: imports, data, compile, and "other" for the rest.

    Args:
      began: `time.perf_counter()` when the program began to import; None: now.
    """

    def __init__(self, began: float | None = None):
        now = time.perf_counter()
        self._began = now if began is None else began
        self._seconds = {"imports": now - self._began, "data": 0.0, "compile": 0.0}

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] += seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose duration is added to a phase."""
        before = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - before)

    def describe(self) -> str:
        """One line with all phases; the start ends now."""
        total = time.perf_counter() - self._began
        parts = self._seconds | {"other": total - sum(self._seconds.values())}
        text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        return f"  start     {text}: first step after {total:.1f} s"


def use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, unless JAX_COMPILATION_CACHE_DIR names another place.

    Each host has its own folder: a program for one CPU may not run on another.
    """
    if jax.config.jax_compilation_cache_dir is None:
        with contextlib.suppress(RuntimeError):  # a user without a home
            folder = Path("~/.cache/mae_jax/compiled").expanduser() / socket.gethostname()
            jax.config.update("jax_compilation_cache_dir", str(folder))
