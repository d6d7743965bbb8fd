"""SIGTERM and Ctrl-C: a run that is told to stop saves first."""

import collections
import contextlib
import functools
import signal
import sys
from collections.abc import Callable
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.runtime.mesh import all_devices

CALLS_UNTIL_AGREED = 2
PATIENCE_SECONDS = 10  # that a process of several goes on waiting for data when it is told to stop


class Stopped(BaseException):
    """The program was told to stop. Not an Exception, so that nothing on its way takes it for an error."""


class StopSignal:
    """While entered, SIGTERM and SIGINT raise `Stopped`; inside `deferred()` they are only noted in `received`.

    A Ctrl-C after the first signal raises KeyboardInterrupt, for those who do not want to wait.
    """

    everywhere = True  # whether all processes of the run have stopped at the same place

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
            if not value:
                self.look()
            yield
        finally:
            self._deferred = before

    def waiting(self):
        """A context inside `deferred()` for a wait that may never end, such as that for data.

        Raises:
          Stopped: for a signal that comes meanwhile, or has come.
        """
        return self.deferred(False)

    def look(self) -> None:
        """Raises `Stopped` if a signal was received: also one whose own `Stopped` was lost, as in a callback."""
        if self.received is not None:
            raise Stopped

    def agree(self) -> None:
        """Makes a signal to any process `received` in all of them; all must call it at the same places."""

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


class SharedStopSignal(StopSignal):
    """The same in a run of several processes, which must stop after the same step or wait for one another for ever.

    A signal is noted by the process that gets it. At every `agree()` all processes start to compare what they have
    noted, on the devices, and take the result of the comparison before the last, which is there by then: so all of
    them have the signal as `received` at the same call, and none waits for it. Inside `deferred()` no process is
    interrupted alone; outside, `Stopped` is raised in the one that gets the signal, and it ends the others. The same
    happens in `waiting()` after PATIENCE_SECONDS: the others are stuck in a step that lacks this one's data.
    """

    everywhere = False
    _waits = False

    def __init__(self):
        super().__init__()
        self._noted = 0
        self._compared: collections.deque[jax.Array] = collections.deque()

    def agree(self) -> None:
        self._compared.append(self._compare(self._noted))
        if len(self._compared) > CALLS_UNTIL_AGREED:
            number = int(self._compared.popleft())
            if number:
                self.received, self.everywhere = number, True

    @functools.cached_property
    def _compare(self) -> Callable[[int], jax.Array]:
        """A number of each process -> the largest of them, still on its way."""
        mesh = Mesh(np.array(all_devices()), "all")
        each, same = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["all"], []))
        largest = jax.jit(jnp.max, out_shardings=same)

        def compare(number: int) -> jax.Array:
            own = np.full(jax.local_device_count(), number, np.int32)
            return largest(jax.make_array_from_process_local_data(each, own))

        return compare

    @contextlib.contextmanager
    def deferred(self, value: bool = True):
        outermost = not self._deferred
        with super().deferred(True):
            if not value:
                self.look()
            yield
        if outermost and self._noted and not self.everywhere:
            self.received = self._noted
            raise Stopped

    def __enter__(self) -> "SharedStopSignal":
        self._old_handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._lose_patience)
        return super().__enter__()

    @contextlib.contextmanager
    def waiting(self):
        try:
            self._waits = True
            if self._noted:
                signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
            yield
        finally:
            self._waits = False
            if self._noted:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _lose_patience(self, *_):
        if self._waits:
            self.received = self._noted
            raise Stopped

    def _handle(self, number: int, _: FrameType | None):
        if self._waits and not self._noted:
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_SECONDS)
        again, self._noted = self._noted, number
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._deferred and not again:
            self.received = number
            raise Stopped


def make_stop_signal() -> StopSignal:
    """The one that fits the number of processes."""
    return SharedStopSignal() if jax.distributed.is_initialized() else StopSignal()
