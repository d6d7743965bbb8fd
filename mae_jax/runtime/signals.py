"""SIGTERM and Ctrl-C: a run saves before it stops.

Except in `waiting()`, a first signal raises no exception: it could be lost in a callback of the garbage collector, or
abort the process in code that C++ calls. Inside `deferred()` a signal is only noted, and checked at every step and
batch. Elsewhere it ends the process at once, which is safe because files are replaced atomically.
"""

import contextlib
import signal
from collections.abc import Iterator
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from mae_jax.runtime import processes

PATIENCE_SECONDS = 0.5  # from a signal until a wait for data is interrupted


class Stopped(BaseException):
    """The program was asked to stop. Not an Exception, so that no handler of errors catches it."""


class StopSignal:
    """A context that handles SIGTERM and SIGINT; a Ctrl-C after another signal raises KeyboardInterrupt."""

    _numbers = (signal.SIGTERM, signal.SIGINT)
    received: int | None = None  # the signal's number
    _deferred = _waiting = False

    def __enter__(self) -> "StopSignal":
        global _current
        handlers = dict.fromkeys(self._numbers, self._handle) | {signal.SIGALRM: self._interrupt_wait}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        _current = self
        return self

    def __exit__(self, *_):
        global _current
        _current = StopSignal()
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A context in which a signal has no effect until the next `look`."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in `deferred()` that raises Stopped PATIENCE_SECONDS after a signal, or at its start."""
        self.look()
        try:
            self._waiting = True
            yield
        finally:
            self._waiting = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def look(self) -> None:
        if self.received is not None:
            raise Stopped

    def agree(self, step: int) -> None:
        """Checks for signals to other processes; all must call it at the same steps."""

    def leave(self) -> NoReturn:
        """Exits with 128 + the signal's number, as shells do: 143 for SIGTERM, 130 for Ctrl-C."""
        processes.end(128 + self.received)

    def _handle(self, number: int, _):
        again, self.received = self.received is not None, number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferred:
            self.leave()
        if self._waiting:  # repeatedly, in case the exception is lost
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS, PATIENCE_SECONDS)

    def _interrupt_wait(self, *_):
        if self._waiting:
            raise Stopped


class SharedStopSignal(StopSignal):
    """For several processes: JAX catches a SIGTERM to any, and all have `received` it at the step it chooses."""

    _numbers = (signal.SIGINT,)
    _asked = _interrupted = False

    def agree(self, step: int) -> None:
        # For a signal before the first query JAX chooses step 1.
        numbers, self._asked = [step] if self._asked or step < 2 else [1, step], True
        if any(map(multihost_utils.reached_preemption_sync_point, numbers)):
            self.received = signal.SIGINT if self._interrupted else signal.SIGTERM

    def leave(self) -> NoReturn:
        jax.distributed.shutdown()  # waits for the others
        super().leave()

    def _handle(self, *_):
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        signal.raise_signal(signal.SIGTERM)  # JAX forwards it to all processes


_current = StopSignal()


def look() -> None:
    """Raises Stopped if the program was asked to stop."""
    _current.look()
