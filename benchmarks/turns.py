"""Programs that are timed turn by turn, each in a process of its own that waits while another one works."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol


class Work(Protocol):
    """What a process of its own does again and again."""

    facts: dict[str, Any]  # what it tells when it is ready

    def __call__(self, count: int) -> dict[str, Any]:
        """Does the work `count` times, to its end, and returns what it has seen."""


class Turn(NamedTuple):
    """One turn's time, and what the work returned."""

    seconds: float  # of one piece of work
    seen: dict[str, Any]


class Failure(NamedTuple):
    """What a process answers that cannot go on: words, since not every exception can be sent."""

    text: str


class Worker:
    """A process that makes its work once, and does some of it when it is told to.

    Args:
      make: a function of a module, which makes the work; called with `arguments` in the new process.
      environment: variables of the new process, from its start on.
      daemon: it ends with this program, but cannot start processes itself; else it must be closed.

    Raises:
      RuntimeError: if the work cannot be made or done, with the other process's words.
    """

    def __init__(
        self,
        make: Callable[..., Work],
        *arguments,
        environment: Mapping[str, str] = {},  # noqa: B006
        daemon: bool = True,
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=daemon)
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        other.close()
        self.facts = self._answer()

    def turn(self, count: int) -> Turn:
        """Does the work `count` times."""
        self._pipe.send(count)
        seconds, seen = self._answer()
        return Turn(seconds / count, seen)

    def close(self) -> None:
        self._process.terminate()
        self._process.join()

    def _answer(self):
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process ended with code {self._process.exitcode}") from None
        if isinstance(answer, Failure):
            raise RuntimeError(answer.text)
        return answer


def _serve(pipe, make: Callable[..., Work], arguments: tuple) -> None:
    try:
        work = make(*arguments)
        pipe.send(work.facts)
        while True:
            count = pipe.recv()
            start = time.perf_counter()
            seen = work(count)
            pipe.send((time.perf_counter() - start, seen))
    except (EOFError, BrokenPipeError):  # the other end is gone
        pass
    except Exception as error:
        pipe.send(Failure(f"{type(error).__name__}: {error}"))


def take_turns(workers: Mapping[str, Worker], rounds: int, least_seconds: float) -> dict[str, list[Turn]]:
    """`rounds` turns of each worker, one after the other, each of at least `least_seconds`, after one to warm up."""
    counts = {}
    for name, worker in workers.items():
        worker.turn(1)
        counts[name] = max(1, round(least_seconds / worker.turn(1).seconds))
    turns: dict[str, list[Turn]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            turns[name].append(worker.turn(counts[name]))
    return turns


class Spread(NamedTuple):
    """The median of some turns' times, and the range of them."""

    median: float
    least: float
    greatest: float


def spread(turns: list[Turn]) -> Spread:
    seconds = [turn.seconds for turn in turns]
    return Spread(statistics.median(seconds), min(seconds), max(seconds))
