"""Lifelines of several processes, all in this one: what would end a process is noted instead."""

import queue
import socket
import threading
import time

import pytest

from mae_jax import lifeline
from mae_jax.lifeline import LOST, Lifeline


@pytest.fixture
def exits(monkeypatch):
    """The exit codes, in the order in which processes end."""
    codes = queue.Queue()

    def note(code):
        codes.put(code)
        threading.Event().wait()  # it does not return

    monkeypatch.setattr(lifeline, "_exit", note)
    monkeypatch.setattr(lifeline, "LEAVE_SECONDS", 0.5)
    return codes


@pytest.fixture
def three(exits):
    said = queue.Queue()
    first = Lifeline(3, 0, "localhost", said.put, None)
    text = said.get()
    others = [Lifeline(3, index, "localhost", None, lambda: text) for index in (1, 2)]
    for _ in range(500):
        if len(first._peers) == 2:
            break
        time.sleep(0.01)
    yield first, *others, int(text.split()[0])
    for line in (first, *others):  # their threads are still there, and must end nobody
        line._done.update(range(3))
        line._all_done.set()


def leave(line, code, reason, say=lambda: None):
    threading.Thread(target=line.leave, args=(code, reason, say), daemon=True).start()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_all_with_its_code_and_the_others_say_whose_it_was(three, exits, capfd, failing):
    leave(three[failing], 2, "failed: no such file")
    assert [exits.get(timeout=5) for _ in range(3)] == [2, 2, 2]
    assert capfd.readouterr().err.splitlines() == [f"error: process {failing} failed: no such file"] * 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_gone_without_a_word_ends_the_others_with_code_1(three, exits, capfd, lost):
    for connection in [three[lost]._up] if lost else list(three[0]._peers):
        connection.shutdown(socket.SHUT_RDWR)
    assert [exits.get(timeout=5) for _ in range(3)] == [1, 1, 1]  # the one that is cut off takes the others for lost
    assert f"error: process {lost} {LOST}" in capfd.readouterr().err


def test_of_two_failures_at_once_each_process_tells_one(three, exits, capfd):
    both_speak = threading.Barrier(2)
    for index in (1, 2):
        leave(three[index], index + 10, "failed", say=both_speak.wait)
    assert {exits.get(timeout=5) for _ in range(3)} == {11, 12}
    assert len(capfd.readouterr().err.splitlines()) == 1  # of process 0; the others have told their own


def test_all_come_to_the_end_before_any_goes_on_and_then_nobody_s_end_is_a_failure(three, exits, capfd):
    first, second, third, _ = three
    waiting = [threading.Thread(target=line.finish, daemon=True) for line in (first, second)]
    for thread in waiting:
        thread.start()
    waiting[0].join(0.3)
    assert all(thread.is_alive() for thread in waiting)
    third.finish()
    for thread in waiting:
        thread.join(5)
        assert not thread.is_alive()
    second._up.shutdown(socket.SHUT_RDWR)
    time.sleep(0.2)
    assert exits.empty() and capfd.readouterr().err == ""


def test_strangers_who_try_the_port_change_nothing(three, exits):
    first, *_, port = three
    for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"failed": 1}\n', b'{"token": "guessed", "process": 1}\n', b"[1]\n"):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(text)
    time.sleep(0.3)
    assert exits.empty() and len(first._peers) == 2
    leave(three[1], 3, "failed")
    assert [exits.get(timeout=5) for _ in range(3)] == [3, 3, 3]
