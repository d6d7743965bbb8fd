"""Where the time of a start goes, from the program's beginning to the end of its first step."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax

PHASES = ("imports", "data", "compile")  # in the order in which they are told


class Startup:
    """A stopwatch for a start. What lies outside its phases is told as "other"."""

    def __init__(self, began: float | None = None):
        """`began`: time.perf_counter() at the program's beginning, from which on it has imported; None: it is now."""
        now = time.perf_counter()
        self._began = now if began is None else began
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.add("imports", now - self._began)

    def add(self, phase: str, seconds: float) -> None:
        """Adds time to a phase."""
        self._seconds[phase] += seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A context whose time is added to a phase."""
        before = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - before)

    def describe(self) -> str:
        """A line that tells the phases; the start ends now."""
        total = time.perf_counter() - self._began
        parts = self._seconds | {"other": total - sum(self._seconds.values())}
        text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        return f"  start     {text}: first step after {total:.1f} s"


def use_compilation_cache() -> None:
    """Keeps what JAX compiles, so that the next start is quicker; JAX_COMPILATION_CACHE_DIR says where instead.

    A folder for each host, since programs for a CPU do not run on every other.
    """
    if jax.config.jax_compilation_cache_dir is None:
        with contextlib.suppress(RuntimeError):  # a user without a home
            folder = Path("~/.cache/mae_jax/compiled").expanduser() / socket.gethostname()
            jax.config.update("jax_compilation_cache_dir", str(folder))
