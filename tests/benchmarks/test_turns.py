import os

import pytest

from benchmarks.turns import Turn, Worker, spread, take_turns


class Adder:
    """Work that counts what it is asked for."""

    def __init__(self, start):
        self.total, self.facts = start, {"process": os.getpid(), "variable": os.environ.get("OF_THE_TEST")}

    def __call__(self, count):
        self.total += count
        return {"total": self.total}


class Unsendable(Exception):
    """An exception that cannot be made from its words, as that of a library may be."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Broken:
    facts = {}

    def __init__(self, where):
        if where == "start":
            raise Unsendable("this", "that")
        self.where = where

    def __call__(self, count):
        if self.where == "end":
            os._exit(7)
        raise ValueError("no more")


def test_a_worker_works_in_a_process_of_its_own_with_its_own_environment_and_keeps_its_work():
    worker = Worker(Adder, 10, environment={"OF_THE_TEST": "yes"})
    try:
        assert worker.facts["process"] != os.getpid() and worker.facts["variable"] == "yes"
        assert "OF_THE_TEST" not in os.environ
        assert [worker.turn(count).seen["total"] for count in (1, 2)] == [11, 13]
    finally:
        worker.close()


def test_what_goes_wrong_in_the_other_process_is_told_in_its_words():
    with pytest.raises(RuntimeError, match="^Unsendable: this and that$"):
        Worker(Broken, "start")
    worker = Worker(Broken, "turn")
    with pytest.raises(RuntimeError, match="^ValueError: no more$"):
        worker.turn(1)
    worker.close()


def test_a_process_that_ends_is_told_with_its_code():
    worker = Worker(Broken, "end")
    with pytest.raises(RuntimeError, match="ended with code 7"):
        worker.turn(1)


class Listed:
    """A worker that notes its turns; a piece of its work takes `seconds`."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, seconds, log

    def turn(self, count):
        self.log.append((self.name, count))
        return Turn(self.seconds, {})


def test_programs_alternate_and_each_turn_is_long_enough():
    log = []
    turns = take_turns({"slow": Listed("slow", 2.0, log), "fast": Listed("fast", 0.25, log)}, 3, 1.0)
    assert log[:4] == [("slow", 1), ("slow", 1), ("fast", 1), ("fast", 1)]  # to warm up, and to see how long it takes
    assert log[4:] == [("slow", 1), ("fast", 4)] * 3
    assert [len(found) for found in turns.values()] == [3, 3]


def test_the_spread_is_median_least_and_greatest():
    assert spread([Turn(seconds, {}) for seconds in (5.0, 1.0, 2.0)]) == (2.0, 1.0, 5.0)
