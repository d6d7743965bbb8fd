import os
import signal
import sys
import time

import pytest

from mae_jax.runtime import signals
from mae_jax.runtime.signals import CALLS_UNTIL_AGREED, SharedStopSignal, Stopped, StopSignal


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_raises_stopped_and_gives_the_shells_exit_code(number, code):
    with StopSignal() as stop:
        with pytest.raises(Stopped):
            send(number)
        assert stop.exit_code() == code


def test_a_deferred_signal_is_only_noted():
    with StopSignal() as stop, stop.deferred():
        assert stop.received is None
        send(signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_inside_a_deferred_part_another_may_be_stopped_at_once():
    with StopSignal() as stop, stop.deferred():
        with pytest.raises(Stopped), stop.deferred(False):
            send(signal.SIGTERM)
        send(signal.SIGTERM)  # deferred again
        assert stop.received == signal.SIGTERM


def test_after_a_deferred_part_signals_stop_at_once_again():
    with StopSignal() as stop:
        with stop.deferred():
            pass
        with pytest.raises(Stopped):
            send(signal.SIGTERM)


def test_a_second_ctrl_c_does_not_wait():
    with StopSignal() as stop, stop.deferred():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_second_sigterm_waits_like_the_first():
    with StopSignal() as stop, stop.deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_no_handler_that_catches_exceptions_mistakes_a_stop_for_an_error():
    assert not issubclass(Stopped, Exception)


def test_the_handlers_from_before_are_put_back_whatever_happens():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(RuntimeError), StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        raise RuntimeError
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_during_garbage_collection_is_noted_without_a_word_and_other_errors_there_are_told(monkeypatch):
    class Raises:
        def __init__(self, action):
            self.action = action

        def __del__(self):
            self.action()

    def fail():
        raise ValueError

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    with StopSignal() as stop:
        for action in (lambda: signal.raise_signal(signal.SIGTERM), fail):
            raises = Raises(action)
            del raises
        assert stop.received == signal.SIGTERM and told == [ValueError]
        with pytest.raises(Stopped):
            stop.look()


def test_a_look_does_nothing_while_there_is_no_signal():
    with StopSignal() as stop:
        stop.look()


def agree(stop, times):
    for _ in range(times):
        stop.agree()


def test_of_several_processes_a_signal_counts_at_the_same_call_in_all():
    with SharedStopSignal() as stop, pytest.raises(Stopped), stop.deferred():
        agree(stop, 3)
        send(signal.SIGTERM)
        agree(stop, CALLS_UNTIL_AGREED)
        assert stop.received is None and not stop.everywhere
        agree(stop, 1)
        assert stop.received == signal.SIGTERM and stop.everywhere and stop.exit_code() == 143
        raise Stopped


def test_of_several_processes_none_is_interrupted_alone_inside_a_deferred_part():
    with SharedStopSignal() as stop, pytest.raises(Stopped), stop.deferred():
        with stop.deferred(False):
            send(signal.SIGTERM)
        agree(stop, CALLS_UNTIL_AGREED + 1)
        with pytest.raises(Stopped), stop.deferred(False):
            raise AssertionError("all have agreed to stop")
        raise Stopped


def test_of_several_processes_one_that_gets_a_signal_elsewhere_stops_alone():
    with SharedStopSignal() as stop:
        with pytest.raises(Stopped):
            send(signal.SIGTERM)
        assert stop.exit_code() == 143 and not stop.everywhere
        send(signal.SIGTERM)  # while it leaves


def test_of_several_processes_a_signal_that_came_too_late_to_agree_stops_after_the_deferred_part():
    with SharedStopSignal() as stop:
        with pytest.raises(Stopped), stop.deferred():
            send(signal.SIGINT)
            agree(stop, 1)
        assert stop.exit_code() == 130 and not stop.everywhere


def test_a_second_ctrl_c_does_not_wait_for_other_processes():
    with SharedStopSignal() as stop, stop.deferred():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        stop._noted = 0


def test_a_wait_ends_at_once_when_a_signal_comes_or_has_come_and_what_follows_is_deferred_again():
    with StopSignal() as stop, stop.deferred():
        for _ in range(2):
            with pytest.raises(Stopped), stop.waiting():
                send(signal.SIGTERM)
                time.sleep(60)
            send(signal.SIGTERM)
        with pytest.raises(Stopped), stop.waiting():
            raise AssertionError("a signal has come")
        assert stop.everywhere


@pytest.mark.parametrize("when", ["before", "during"])
def test_of_several_processes_a_wait_goes_on_for_a_while_and_then_ends_for_all(monkeypatch, when):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.2)
    with SharedStopSignal() as stop, pytest.raises(Stopped), stop.deferred():
        if when == "before":
            send(signal.SIGTERM)
        with stop.waiting():
            if when == "during":
                send(signal.SIGTERM)
        time.sleep(0.4)  # the data came: nothing happens, and all can agree
        assert stop.received is None
        with pytest.raises(Stopped), stop.waiting():
            time.sleep(60)
        assert stop.received == signal.SIGTERM and not stop.everywhere
        raise Stopped
