"""Where time goes: up to the end of the first step (and the cache that shortens it); a profile of steps."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import reason

STEPS_BEFORE = 3  # the profile: the first steps of a run fill caches


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


class Profiler:
    """Traces `steps` steps of a run (0: none); each process writes to its own folder."""

    def __init__(self, folder: Path, steps: int, start_step: int):
        self._folder, self._active = folder, False
        self._steps = range(start_step + STEPS_BEFORE, start_step + STEPS_BEFORE + steps)

    def before_step(self, step: int, state: Any) -> None:
        """Starts or ends the trace when due; `state` is the step's input."""
        if self._active != (step in self._steps):
            jax.block_until_ready(state)  # the device lags some steps behind
            if self._active:
                self.close()
            else:
                jax.profiler.start_trace(self._folder / f"process_{jax.process_index()}")
                self._active = True

    def close(self) -> None:
        if self._active:
            self._active = False
            try:
                jax.profiler.stop_trace()
            except (OSError, RuntimeError) as error:  # a full disk
                say(f"the profile cannot be written: {reason(error)}; the run goes on without it")
