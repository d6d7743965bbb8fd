"""SIGTERM and Ctrl-C: a run that is asked to stop saves first.

A signal is only noted. Work that has to be saved stands in `deferred()` and looks for a signal at every step and every
batch, so that it stops between two of them. Elsewhere nothing has to be saved, and a signal ends the process at once.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

from mae_jax.runtime import processes

PATIENCE_SECONDS = 0.5  # for data that are waited for when a signal comes


class Stopped(BaseException):
    """The program was asked to stop. Not an Exception, so that nothing on its way takes it for an error."""


class StopSignal:
    """While entered, handles SIGTERM and SIGINT.

    A Ctrl-C after the first signal raises KeyboardInterrupt, for those who do not want to wait.

    Attributes:
      received: the number of the signal that the run has to obey; None: there was none.
    """

    _numbers = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: int | None = None
        self._deferred = self._waiting = False

    def __enter__(self) -> "StopSignal":
        global _current
        handlers = dict.fromkeys(self._numbers, self._handle) | {signal.SIGALRM: self._interrupt_wait}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        _current = self
        return self

    def __exit__(self, *_):
        global _current
        _current = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A context in which a signal waits for the next look."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context inside `deferred()` for a wait that may never end, such as that for data.

        Raises:
          Stopped: for a signal that has come, or comes and the wait does not end soon after.
        """
        self.look()
        try:
            self._waiting = True
            yield
        finally:
            self._waiting = False
            if self.received is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def look(self) -> None:
        """Raises `Stopped` if there was a signal."""
        if self.received is not None:
            raise Stopped

    def agree(self) -> None:
        """Looks for signals to other processes; all must call it at the same places."""

    def exit_code(self) -> int:
        """128 + the signal's number, as in shells: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.received

    def _handle(self, number: int, _: FrameType | None):
        again, self.received = self.received is not None, number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferred:
            processes.end(self.exit_code())
        if self._waiting:  # again and again, since an exception can be lost in a callback
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS, PATIENCE_SECONDS)

    def _interrupt_wait(self, *_):
        if self._waiting:
            raise Stopped


class SharedStopSignal(StopSignal):
    """For several processes, which must stop after the same step: JAX notes SIGTERM and settles on the step.

    A SIGTERM to any of them is `received` in all at the same call of `agree`. Until then none is interrupted.
    """

    _numbers = (signal.SIGINT,)
    _calls, _interrupted = 0, False

    def agree(self) -> None:
        self._calls += 1
        if multihost_utils.reached_preemption_sync_point(self._calls):
            self.received = signal.SIGINT if self._interrupted else signal.SIGTERM

    def _handle(self, *_):
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        signal.raise_signal(signal.SIGTERM)  # which JAX tells the others


_current: StopSignal | None = None


def look() -> None:
    """Raises `Stopped` if this program was asked to stop and stands in `deferred()`."""
    if _current is not None:
        _current.look()


def make_stop_signal(saves: bool) -> StopSignal:
    """The one for this number of processes; `saves`: whether the task is one that saves before it stops."""
    several = processes.process_count() > 1
    return SharedStopSignal() if several and saves and jax.config.jax_enable_preemption_service else StopSignal()
