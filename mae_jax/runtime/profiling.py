"""A profile of a few steps, for TensorBoard's profiler or Perfetto."""

from pathlib import Path
from typing import Any

import jax

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import reason

STEPS_BEFORE = 3  # the first steps of a run fill caches


class Profiler:
    """Traces `steps` steps of a run (0: none); each process writes to its own folder."""

    def __init__(self, folder: Path, steps: int, start_step: int):
        self._folder = folder
        self._steps = range(start_step + STEPS_BEFORE, start_step + STEPS_BEFORE + steps)
        self._active = False

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
