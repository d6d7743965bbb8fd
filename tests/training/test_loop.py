"""The loop with a step that takes no time: its state is the list of batches that it has seen."""

import itertools
import os
import signal
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest

from mae_jax.runtime import signals
from mae_jax.runtime.signals import SharedStopSignal, Stopped, StopSignal
from mae_jax.runtime.timing import Profiler, Startup
from mae_jax.training.loop import NonFiniteLoss, train


class State(NamedTuple):
    step: int
    seen: tuple[int, ...]
    skipped: int = 0


class FakeCheckpoints:
    """Notes what is saved in `events`, and keeps it in `saved`."""

    def __init__(self, events, every_steps):
        self.events, self.every_steps, self.saved, self.waited = events, every_steps, {}, False

    def due(self, step):
        return step > 0 and step % self.every_steps == 0

    def latest_step(self):
        return max(self.saved, default=None)

    def save(self, step, state):
        if step not in self.saved:
            self.events.append(f"save {step}")
            self.saved[step] = state
            self.waited = False

    def set_aside(self, step):
        self.saved.pop(step, None)

    def wait(self):
        self.waited = True

    def check(self):
        pass


class FakeReporter:
    def __init__(self, evaluated=()):
        self.evaluated, self.logged, self.lines = dict.fromkeys(evaluated), [], []

    def scalars(self, step, scalars, prefix=""):
        self.evaluated[step] = {prefix + name: value for name, value in scalars.items()}

    def training(self, step, scalars, *, seconds, steps, waited):
        assert 0 <= waited <= seconds
        self.logged.append((step, scalars, steps))

    def line(self, text):
        self.lines.append(text)

    def has_evaluation(self, step):
        return step in self.evaluated


class Run:
    """A run of the loop that can be watched.

    `losses`: step -> loss (or (loss, gradient norm)) other than 1.0; `dead`: steps whose state is not finite.
    """

    def __init__(
        self, *, start=None, total=10, every=3, log=2, evaluate=4, losses=None, evaluated=(), stop=None, skip=0,
        dead=(),
    ):  # fmt: skip
        self.events = []
        self.checkpoints, self.reporter = FakeCheckpoints(self.events, every), FakeReporter(evaluated)
        self.start, self.total, self.log, self.every_evaluation = start or State(0, ()), total, log, evaluate
        self.losses, self.stop, self.skip, self.dead = losses or {}, stop or StopSignal(), skip, dead
        self.profiler = Profiler(None, 0, self.start.step)
        self.on_batch, self.on_evaluation, self.evaluation = {}, lambda: None, 1.0

    def batches(self):
        for index in itertools.count(self.start.step):
            self.events.append(f"batch {index}")
            self.on_batch.get(index, lambda: None)()
            yield index

    def step_fn(self, state, batch, key):
        assert key == "key"
        self.events.append(f"step {state.step + 1}")
        loss, norm = np.broadcast_to(self.losses.get(state.step + 1, 1.0), 2).tolist()
        scalars = {"loss": loss, "grad_norm": norm, "finite": state.step + 1 not in self.dead}
        if self.skip:
            left_out = not (np.isfinite([loss, norm]).all() and scalars["finite"]) and state.skipped < self.skip
            seen, skipped = state.seen if left_out else (*state.seen, batch), state.skipped + left_out
            return State(state.step + 1, seen, skipped), scalars | {"skipped": skipped}
        return State(state.step + 1, (*state.seen, batch)), scalars

    def evaluate(self, state):
        self.events.append(f"evaluate {state.step}")
        self.on_evaluation()
        self.events.append(f"evaluated {state.step}")
        return {"loss": self.evaluation, "batches": len(state.seen)}

    def __call__(self):
        with self.stop:
            return train(
                self.start, self.step_fn, self.batches(), "key",
                total_steps=self.total, log_every_steps=self.log,
                evaluate=self.evaluate, evaluate_every_steps=self.every_evaluation,
                checkpoints=self.checkpoints, reporter=self.reporter, profiler=self.profiler, stop=self.stop,
                startup=Startup(),
            )  # fmt: skip


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_order_is_evaluate_save_batch_step():
    run = Run(total=5, every=2, evaluate=2)
    run()
    assert run.events == [
        "batch 0", "step 1", "batch 1", "step 2",
        "evaluate 2", "evaluated 2", "save 2", "batch 2", "step 3", "batch 3", "step 4",
        "evaluate 4", "evaluated 4", "save 4", "batch 4", "step 5",
        "save 5",
    ]  # fmt: skip


@pytest.mark.parametrize("start", [State(0, ()), State(5, (0, 1, 2, 3, 4))])
def test_a_start_is_told_once_when_its_first_step_is_done(start):
    run, told = Run(start=start), []
    run.reporter.line = lambda line: told.append((run.events[-1], line))
    run()
    ((when, line),) = told
    assert when == f"step {start.step + 1}" and line.startswith("  start     imports 0.0 s, data ")


def test_a_state_that_is_saved_after_s_steps_has_seen_the_batches_below_s():
    run = Run()
    last = run()
    assert last == State(10, tuple(range(10)))
    assert run.checkpoints.saved == {step: State(step, tuple(range(step))) for step in (3, 6, 9, 10)}


def test_a_resumed_run_sees_the_batches_that_the_saved_state_has_not():
    first = Run(total=6)
    first()
    second = Run(start=first.checkpoints.saved[3])
    assert second() == Run()()
    assert next(event for event in second.events if event.startswith("batch")) == "batch 3"


def test_the_last_state_is_on_disk_when_the_run_returns():
    run = Run(total=4, every=100)
    run()
    assert run.checkpoints.saved.keys() == {4} and run.checkpoints.waited


def test_a_run_at_its_last_step_takes_no_batch_and_makes_no_step():
    run = Run(start=State(10, tuple(range(10))), evaluate=5)
    assert run() == run.start
    assert run.events == ["save 10"]


def test_evaluations_fall_on_multiples_between_the_first_and_the_last_step():
    run = Run(total=8, evaluate=4)
    run()
    assert run.reporter.evaluated == {4: {"eval/loss": 1.0, "eval/batches": 4}}
    without = Run(total=8, evaluate=None)
    without()
    assert without.reporter.evaluated == {}


def test_an_evaluation_that_was_reported_before_the_resume_is_not_made_again():
    run = Run(start=State(4, (0, 1, 2, 3)), evaluated=[4])
    run()
    assert [event for event in run.events if event.startswith("evaluate ")] == ["evaluate 8"]


def test_scalars_are_reported_at_multiples_and_at_the_first_and_last_step_each_over_the_steps_since():
    run = Run(total=7, log=3, losses={3: 0.5, 7: 0.25})
    run()
    assert run.reporter.logged == [
        (1, {"loss": 1, "grad_norm": 1}, 1), (3, {"loss": 0.5, "grad_norm": 0.5}, 2),
        (6, {"loss": 1, "grad_norm": 1}, 3), (7, {"loss": 0.25, "grad_norm": 0.25}, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("value", [(np.nan, 1), (np.inf, 1), (1, np.nan), (1, np.inf)])
@pytest.mark.parametrize(("log", "every"), [(1, 1), (7, 4), (100, 5), (100, 1)])
def test_a_loss_or_gradient_that_is_no_number_stops_the_run_with_its_step_and_nothing_is_saved_from_it_on(
    value, log, every
):
    run = Run(total=20, log=log, every=every, evaluate=None, losses={5: value, 6: np.nan, 7: 1.0})
    with pytest.raises(NonFiniteLoss) as error:
        run()
    assert error.value.step == 5
    name = "loss" if value[1] == 1 else "grad_norm"
    assert f"train/{name} is {max(value) if np.inf in value else 'nan'} at step 5" in str(error.value)
    # The loss of step 5 is that of the state after step 4: that one is not good either.
    last = {"grad_norm": {1: 4, 4: 4}, "loss": {1: 3}}[name].get(every)
    assert run.checkpoints.latest_step() == last
    assert f"checkpoint {last} is the last good one" in str(error.value) or last is None
    assert all(step < 5 for step, _, _ in run.reporter.logged)


def test_a_loss_that_is_no_number_is_found_before_an_evaluation_of_what_it_left():
    run = Run(log=100, every=100, evaluate=4, losses={4: np.nan})
    with pytest.raises(NonFiniteLoss):
        run()
    assert not run.reporter.evaluated


@pytest.mark.parametrize("batch", [0, 2, 3, 6, 9])
def test_a_signal_while_a_batch_is_waited_for_ends_the_wait_with_everything_saved(batch):
    run = Run()
    run.on_batch[batch] = lambda: (terminate(), time.sleep(60))
    with pytest.raises(Stopped):
        run()
    step = batch
    assert run.checkpoints.latest_step() == step and run.checkpoints.waited
    assert run.checkpoints.saved[step] == State(step, tuple(range(step)))
    assert run.stop.received == signal.SIGTERM
    assert f"at step {step}" in run.reporter.lines[-1]
    assert f"step {step + 1}" not in run.events


def test_a_signal_cuts_an_evaluation_short_and_the_resumed_run_makes_it():
    run = Run(every=100)
    run.on_evaluation = lambda: (terminate(), signals.look())
    with pytest.raises(Stopped):
        run()
    assert "evaluate 4" in run.events and "evaluated 4" not in run.events
    assert run.checkpoints.saved == {4: State(4, (0, 1, 2, 3))} and run.checkpoints.waited
    assert run.reporter.evaluated == {}
    again = Run(start=run.checkpoints.saved[4])
    assert again() == Run()()
    assert again.reporter.evaluated.keys() == {4, 8}


def test_a_signal_before_an_evaluation_does_not_wait_for_it():
    run = Run()
    make_step = run.step_fn
    run.step_fn = lambda state, *others: (state.step == 3 and terminate(), make_step(state, *others))[1]
    with pytest.raises(Stopped):
        run()
    assert "evaluate 4" not in run.events


def test_a_signal_between_any_two_looks_at_it_is_stopped_with_the_state_saved():
    class SignalAtLook(StopSignal):
        """The signal arrives just before the loop looks for the `last`-th time."""

        last, looks = 0, 0
        received = property(lambda self: self._look(), lambda self, value: None)

        def _look(self):
            self.looks += 1
            return signal.SIGTERM if self.looks >= self.last else None

    for look in range(1, 25):
        run = Run(total=6, every=100, evaluate=None, stop=SignalAtLook())
        run.stop.last = look
        try:
            run()
        except Stopped:
            assert run.checkpoints.saved and run.checkpoints.waited, f"look {look}"
            if run.checkpoints.latest_step() < 6:
                assert f"at step {run.checkpoints.latest_step()};" in run.reporter.lines[-1]
        else:
            assert run.checkpoints.latest_step() == 6


def test_the_handlers_defer_a_signal_that_comes_while_a_step_runs():
    run = Run(total=3, every=100, evaluate=None)
    make_step = run.step_fn

    def step_fn(state, batch, key):
        if state.step == 1:
            terminate()
        return make_step(state, batch, key)

    run.step_fn = step_fn
    with pytest.raises(Stopped):
        run()
    assert run.checkpoints.saved == {2: State(2, (0, 1))}


def test_of_several_processes_all_stop_at_the_call_that_they_agree_on_with_everything_saved(monkeypatch):
    monkeypatch.setattr(signals.multihost_utils, "reached_preemption_sync_point", lambda step: step == 5)
    run = Run(stop=SharedStopSignal(), every=100)
    with pytest.raises(Stopped):
        run()
    assert run.stop.received == signal.SIGTERM and run.events[-1] == "save 5"
    assert run.checkpoints.saved == {5: State(5, (0, 1, 2, 3, 4))} and run.checkpoints.waited


def test_updates_that_are_left_out_are_told_and_the_run_goes_on_until_there_are_too_many():
    nan = float("nan")
    run = Run(losses={3: nan, 5: (1.0, nan)}, skip=2)
    assert run() == State(10, (0, 1, 3, 5, 6, 7, 8, 9), 2)
    assert [line.split(";")[0] for line in run.reporter.lines[1:]] == [  # after the line of the start
        "step 3: train/loss is nan", "step 5: train/grad_norm is nan"
    ]  # fmt: skip
    run = Run(losses={3: nan, 5: nan, 6: nan}, skip=2, every=1)
    with pytest.raises(NonFiniteLoss) as error:
        run()
    assert error.value.step == 6 and len(run.reporter.lines) == 3
    assert max(run.checkpoints.saved) == 2  # the state after step 4 has no finite loss; that after 3 is of a bad step


@pytest.mark.parametrize("skip", [0, 2])
def test_a_state_that_is_not_finite_is_never_saved_though_loss_and_gradient_are(skip):
    run = Run(total=20, log=100, every=1, evaluate=None, dead=range(5, 20), skip=skip)
    with pytest.raises(NonFiniteLoss, match=f"the state after the update is not finite at step {5 + skip}; checkpoint"):
        run()
    assert run.checkpoints.latest_step() == 4 + skip  # the updates that were left out change nothing
    assert all(state.seen == tuple(range(min(step, 4))) for step, state in run.checkpoints.saved.items())


@pytest.mark.parametrize("every", [1, 3, 4])
def test_parameters_that_give_no_finite_loss_any_more_are_not_saved_while_updates_are_left_out(every):
    run = Run(total=100, every=every, evaluate=None, losses=dict.fromkeys(range(5, 100), np.nan), skip=10)
    with pytest.raises(NonFiniteLoss) as error:
        run()
    assert error.value.step == 15, "the first after the limit"
    assert run.checkpoints.latest_step() == {1: 3, 3: 3, 4: None}[every]
    assert f"save {every * (5 // every + 1)}" not in run.events


def test_a_signal_while_updates_are_left_out_does_not_save_what_gives_no_finite_loss():
    run = Run(every=2, evaluate=None, losses=dict.fromkeys((5, 6, 7), np.nan), skip=10)
    run.on_batch[6] = terminate
    with pytest.raises(Stopped):
        run()
    assert run.checkpoints.latest_step() == 4 and run.checkpoints.waited
    assert "at step 7; its loss is not finite and it is not saved" in run.reporter.lines[-1]


def test_a_last_update_that_was_left_out_is_the_end_of_the_run_if_the_state_can_be_evaluated():
    run = Run(total=6, every=4, evaluate=None, losses={6: np.nan}, skip=1)
    assert run().seen == (0, 1, 2, 3, 4)
    assert run.events[-3:] == ["evaluate 6", "evaluated 6", "save 6"]


@pytest.mark.parametrize(("total", "evaluate"), [(6, None), (20, 6)])
def test_an_evaluation_that_is_not_finite_takes_what_was_saved_of_that_state_with_it(total, evaluate):
    run = Run(total=total, every=2, evaluate=evaluate, losses=dict.fromkeys((5, 6), np.nan), skip=10)
    run.evaluation = np.nan
    with pytest.raises(NonFiniteLoss, match="eval/loss is nan at step 6; checkpoint 2 is the last good one"):
        run()
    assert run.checkpoints.saved.keys() == {2} and not run.reporter.evaluated


def test_updates_left_out_before_a_restart_count():
    run = Run(start=State(4, (0, 1), 2), losses={6: float("nan")}, skip=2)
    with pytest.raises(NonFiniteLoss):
        run()


def test_a_transfer_to_the_device_that_nobody_asked_for_is_an_error_in_the_loop():
    class Careless(Run):
        def step_fn(self, state, batch, key):
            jax.numpy.ones(3) + np.ones(3)
            return super().step_fn(state, batch, key)

    with pytest.raises(Exception, match="[Dd]isallowed"):
        Careless()()
    Run()()
