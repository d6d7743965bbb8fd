"""Startup time, from the program's beginning to the end of its first step, and the cache that shortens it."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax


class Startup:
    """Times the phases of a start: imports (since `began`, a `time.perf_counter()`), data, compile, and the rest."""

    def __init__(self, began: float | None = None):
        now = time.perf_counter()
        self._began = now if began is None else began
        self._seconds = {"imports": now - self._began, "data": 0.0, "compile": 0.0}

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] += seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - before)

    def describe(self) -> str:
        """Ends the start; returns a line with all phases in seconds."""
        total = time.perf_counter() - self._began
        parts = self._seconds | {"other": total - sum(self._seconds.values())}
        text = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
        return f"  start     {text}: first step after {total:.1f} s"


def use_compilation_cache() -> None:
    """Caches compiled programs for each host (CPUs differ), unless JAX_COMPILATION_CACHE_DIR names a folder."""
    if jax.config.jax_compilation_cache_dir is None:
        with contextlib.suppress(RuntimeError):  # a user without a home
            folder = Path("~/.cache/mae_jax/compiled").expanduser() / socket.gethostname()
            jax.config.update("jax_compilation_cache_dir", str(folder))
