import os
import signal
import time

import pytest

from mae_jax.runtime import processes, signals
from mae_jax.runtime.signals import SharedStopSignal, Stopped, StopSignal, look


def send(number):
    os.kill(os.getpid(), number)


class Ended(Exception):
    pass


@pytest.fixture(autouse=True)
def end(monkeypatch):
    """What would end the process raises an error with its exit code."""

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(processes, "end", end)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_where_nothing_has_to_be_saved_a_signal_ends_the_process_at_once_with_the_shells_exit_code(number, code):
    with StopSignal(), pytest.raises(Ended, match=str(code)):
        send(number)


def test_a_deferred_signal_waits_for_a_look():
    with StopSignal() as stop, stop.deferred():
        look()
        send(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        for looks in (look, stop.look):
            with pytest.raises(Stopped):
                looks()
    look()  # of a program that does not care for signals


def test_after_a_deferred_part_signals_end_the_process_at_once_again():
    with StopSignal() as stop:
        with stop.deferred(), stop.deferred():
            pass
        with pytest.raises(Ended):
            send(signal.SIGTERM)


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_waits_like_the_first():
    with StopSignal() as stop, stop.deferred():
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_no_handler_that_catches_exceptions_mistakes_a_stop_for_an_error():
    assert not issubclass(Stopped, Exception)


def test_the_handlers_from_before_are_put_back_whatever_happens():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    for make in (StopSignal, SharedStopSignal):
        with pytest.raises(RuntimeError), make():
            assert signal.getsignal(signal.SIGINT) != before[signal.SIGINT]
            raise RuntimeError
        assert {number: signal.getsignal(number) for number in numbers} == before


def test_a_deferred_signal_in_a_callback_of_the_garbage_collector_is_not_lost_and_nothing_is_printed(capfd):
    class Raises:
        def __del__(self):
            send(signal.SIGTERM)

    with StopSignal() as stop, stop.deferred():
        Raises()
        with pytest.raises(Stopped):
            look()
    assert capfd.readouterr().err == ""


def test_a_wait_that_lasts_ends_when_a_signal_comes_and_one_that_does_not_is_left_alone(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.05)
    with StopSignal() as stop, stop.deferred():
        with stop.waiting():
            send(signal.SIGTERM)
        time.sleep(0.2)
        stop.received = None
        with pytest.raises(Stopped), stop.waiting():
            send(signal.SIGTERM)
            try:
                time.sleep(60)
            except Stopped:  # lost, as in a callback: another one comes
                time.sleep(60)
        time.sleep(0.2)
        with pytest.raises(Stopped), stop.waiting():
            raise AssertionError("a signal has come")


def test_of_several_processes_none_stops_before_all_agree_and_jax_gets_the_signals(monkeypatch):
    noted = []
    monkeypatch.setattr(signals.multihost_utils, "reached_preemption_sync_point", lambda step: noted and step == 6)
    before = signal.signal(signal.SIGTERM, lambda *_: noted.append("SIGTERM"))  # as JAX's own handler
    try:
        with SharedStopSignal() as stop:
            stop.agree(4)
            send(signal.SIGINT)
            stop.agree(5)
            stop.look()
            assert noted == ["SIGTERM"]
            stop.agree(6)
            assert stop.received == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_a_signal_to_several_processes_that_comes_before_their_first_step_counts(monkeypatch, step):
    monkeypatch.setattr(signals.multihost_utils, "reached_preemption_sync_point", lambda step: step == 1)
    stop = SharedStopSignal()
    stop.agree(step)
    assert (stop.received is None) == (step == 0)
    stop.agree(step + 1)
    assert stop.received == signal.SIGTERM
