"""SIGTERM and Ctrl-C: a run that is told to stop saves first."""

import contextlib
import signal
import sys
from types import FrameType


class Stopped(BaseException):
    """The program was told to stop. Not an Exception, so that nothing on its way takes it for an error."""


class StopSignal:
    """While entered, SIGTERM and SIGINT raise `Stopped`; inside `deferred()` they are only noted in `received`.

    A Ctrl-C after the first signal raises KeyboardInterrupt, for those who do not want to wait.
    """

    def __init__(self):
        self.received: int | None = None
        self._deferred = False
        self._old_handlers = {}

    def __enter__(self) -> "StopSignal":
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._report_unraisable
        for number in (signal.SIGTERM, signal.SIGINT):
            self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        sys.unraisablehook = self._old_hook
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self, value: bool = True):
        """A context in which a signal waits until it is asked for; `deferred(False)` inside one lifts that again.

        Raises:
          Stopped: on entering `deferred(False)`, if a signal has been waiting.
        """
        before = self._deferred
        try:
            self._deferred = value
            if self.received is not None and not value:
                raise Stopped
            yield
        finally:
            self._deferred = before

    def _report_unraisable(self, unraisable) -> None:
        """In a callback of the garbage collector nothing can be raised: `received` stops the run at its next look."""
        if unraisable.exc_type is not Stopped:
            self._old_hook(unraisable)

    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.received

    def _handle(self, number: int, _: FrameType | None):
        again, self.received = self.received is not None, number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferred:
            raise Stopped
