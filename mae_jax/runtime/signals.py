"""SIGTERM and Ctrl-C: a run that is asked to stop saves first.

A signal raises nothing where it happens to arrive: an exception there can be lost, as in a callback of the garbage
collector, or abort the process, as in code that C++ calls. Work that has to be saved stands in `deferred()`, where a
signal is noted and looked for at every step and every batch. Elsewhere it ends the process at once, which is as safe as
any other end: files are replaced as a whole.
"""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from jax.experimental import multihost_utils

from mae_jax.runtime import processes

PATIENCE_SECONDS = 0.5  # for data that are waited for when a signal comes


class Stopped(BaseException):
    """The program was asked to stop. Not an Exception, so that nothing on its way takes it for an error."""


class StopSignal:
    """While entered, handles SIGTERM and SIGINT. A Ctrl-C after the first signal raises KeyboardInterrupt.

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
        signal.setitimer(signal.ITIMER_REAL, 0)
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

    def agree(self, step: int) -> None:
        """Looks for signals to other processes; all must call it at the same steps."""

    def leave(self) -> NoReturn:
        """Ends the process with 128 + the signal's number, as in shells: 143 for SIGTERM, 130 for Ctrl-C."""
        processes.end(128 + self.received)

    def _handle(self, number: int, _: FrameType | None):
        again, self.received = self.received is not None, number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferred:
            self.leave()
        if self._waiting:  # and again, in case the exception is lost
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS, PATIENCE_SECONDS)

    def _interrupt_wait(self, *_):
        if self._waiting:
            raise Stopped


class SharedStopSignal(StopSignal):
    """For several processes, which must stop after the same step: JAX notes SIGTERM and settles on the step.

    A SIGTERM to any of them is `received` in all at the same step. Until then none is interrupted.
    """

    _numbers = (signal.SIGINT,)
    _asked = _interrupted = False

    def agree(self, step: int) -> None:
        # Of a signal before anybody asked JAX says that 1 is the step. Orbax asks too, with the step that it saves.
        numbers, self._asked = [step] if self._asked or step < 2 else [1, step], True
        if any(map(multihost_utils.reached_preemption_sync_point, numbers)):
            self.received = signal.SIGINT if self._interrupted else signal.SIGTERM

    def leave(self) -> NoReturn:
        processes.finish()
        super().leave()

    def _handle(self, *_):
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        signal.raise_signal(signal.SIGTERM)  # which JAX tells the others


_current: StopSignal | None = None


def look() -> None:
    """Raises `Stopped` if the program was asked to stop."""
    if _current is not None:
        _current.look()


def make_stop_signal(saves: bool) -> StopSignal:
    """The one for this number of processes; `saves`: whether the task saves before it stops."""
    return SharedStopSignal() if saves and processes.process_count() > 1 else StopSignal()
