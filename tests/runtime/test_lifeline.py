"""Lifelines of several processes, all in this one: what would end a process is noted instead."""

import queue
import socket
import threading
import time

import pytest

from mae_jax.runtime import lifeline, processes
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.lifeline import LOST, Lifeline


@pytest.fixture
def exits(monkeypatch):
    """The exit codes, in the order in which processes end."""
    codes = queue.Queue()

    def note(code):
        codes.put(code)
        threading.Event().wait()  # it does not return

    monkeypatch.setattr(lifeline, "_exit", note)
    monkeypatch.setattr(lifeline, "LEAVE_SECONDS", 0.5)
    monkeypatch.setattr(lifeline, "REFUSED_SECONDS", 0.5)
    monkeypatch.setattr(lifeline, "RETRY_SECONDS", 0.1)
    return codes


@pytest.fixture
def three(exits):
    first = Lifeline(3, 0, "localhost", 0, timeout=5, service_port=77)
    others = [Lifeline(3, index, "localhost", first.port, timeout=5) for index in (1, 2)]
    yield first, *others, first.port
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


def test_those_who_wait_in_vain_for_a_further_process_all_say_so(three, exits, capfd, monkeypatch):
    monkeypatch.setattr(processes, "_lifeline", three[0])
    threading.Thread(target=processes._give_up, args=("host:1, process 0 of 4", 300), daemon=True).start()
    assert [exits.get(timeout=5) for _ in range(3)] == [2, 2, 2]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all("the processes did not find one another within 300 s" in line for line in lines)


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
    greetings = (b'{"mae_jax": 1, "count": 3}\n', b'{"mae_jax": [1], "count": 3}\n', b'{"mae_jax": 9, "count": 3}\n')
    for text in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"failed": 1}\n', b"[1]\n", *greetings):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(text)
    time.sleep(0.3)
    assert exits.empty() and len(first._peers) == 2
    leave(three[1], 3, "failed")
    assert [exits.get(timeout=5) for _ in range(3)] == [3, 3, 3]


def test_all_learn_where_the_service_of_process_0_is(three):
    assert [line.service_port for line in three[:3]] == [77] * 3


@pytest.mark.parametrize(
    ("count", "index", "expected"),
    [
        (3, 0, r"process 0 cannot listen on port \d+ \(Address already in use\): choose another port: --coordinator="),
        (3, 1, "process 1 of 3 does not find .*: another run, which has its process 1 already, listens there; choose"),
        (4, 3, "process 3 of 4 does not find .*: another run, which has 3 processes, not 4, listens there; choose"),
    ],
)
def test_a_newcomer_to_the_port_of_a_run_is_refused_and_the_run_goes_on(three, exits, capfd, count, index, expected):
    first, *_, port = three
    with pytest.raises(UserError, match=expected):
        Lifeline(count, index, "localhost", port, timeout=5)
    assert exits.empty() and len(first._peers) == 2 and capfd.readouterr().err == ""


def test_a_process_that_was_lost_is_not_replaced_by_a_newcomer(three, exits):
    *_, port = three
    three[1]._up.shutdown(socket.SHUT_RDWR)
    assert exits.get(timeout=5) == 1
    with pytest.raises(UserError, match="has its process 1 already"):
        Lifeline(3, 1, "localhost", port, timeout=5)


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"\0\0\x12\x04", b"", b"{}\n"])
def test_another_program_on_the_port_is_told(exits, answer):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(100)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(UserError, match=f"localhost:{port}: another program listens there; choose another port"):
            Lifeline(2, 1, "localhost", port, timeout=5)
        with pytest.raises(UserError, match=f"cannot listen on port {port}"):
            Lifeline(2, 0, "localhost", port, timeout=5)


def test_process_0_is_waited_for_and_its_absence_told(exits):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(UserError, match=f"localhost:{port}: Connection refused; are all processes started"):
        Lifeline(2, 1, "localhost", port, timeout=0.2)
    late = []
    threading.Timer(0.5, lambda: late.append(Lifeline(2, 0, "localhost", port, 5, service_port=9))).start()
    assert Lifeline(2, 1, "localhost", port, timeout=5).service_port == 9
