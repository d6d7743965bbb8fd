"""One run at a time in a workdir; with real processes, since a lock is a process's own."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mae_jax.runtime.errors import UserError
from mae_jax.workdir import lock
from mae_jax.workdir.lock import locked
from tests.runs import ROOT, TINY, run, start

HOLD = """
import sys, pathlib; from mae_jax.workdir.lock import locked
with locked(pathlib.Path(sys.argv[1])): print(1); input()"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the test's folder."""
    command = [sys.executable, "-uc", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_with_process_host_and_start_of_the_first(tmp_path, holder):
    with pytest.raises(UserError) as error, locked(tmp_path):
        pass
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"--workdir={tmp_path} is in use by process {holder.pid} on ")
    assert socket.gethostname() in message and f"which started {time.strftime('%Y-%m-')}" in message


def test_the_lock_goes_with_its_process_even_if_that_is_killed(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.NAME).exists(), "what a killed run leaves"
    with locked(tmp_path):
        pass
    assert not (tmp_path / lock.NAME).exists()


def test_nothing_of_it_stays_when_a_run_ends(tmp_path, holder):
    holder.communicate("\n")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_deleted_before_it_was_got_is_got_again(tmp_path, monkeypatch):
    lockf = fcntl.lockf

    def lock_late(file, how):  # the run before ended, and deleted the file, between open and lock
        monkeypatch.setattr(fcntl, "lockf", lockf)
        (tmp_path / lock.NAME).unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", lock_late)
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / lock.NAME).read_text()


def test_a_lock_that_is_a_link_a_folder_or_a_pipe_is_one_line(tmp_path):
    make = {"link": lambda path: path.symlink_to(target), "folder": os.mkdir, "pipe": os.mkfifo}
    target = tmp_path / "target"
    for kind, make_path in make.items():
        (tmp_path / kind).mkdir()
        make_path(tmp_path / kind / lock.NAME)
        with pytest.raises(UserError, match=r"\.lock is no (file|lock of a run): remove it"), locked(tmp_path / kind):
            pass
    assert not target.exists()


@pytest.mark.parametrize("text", ["precious", '{"name": "package"}', "[1]"])
def test_a_file_of_that_name_of_something_else_is_neither_overwritten_nor_deleted(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    with pytest.raises(UserError, match=r"\.lock is no lock of a run: remove it"), locked(tmp_path):
        pass
    assert (tmp_path / lock.NAME).read_text() == text


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys, code):
    def lockf(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path):
        out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"cannot be locked ({os.strerror(code)})" in out


@pytest.mark.slow
def test_of_two_runs_in_one_workdir_the_second_ends_with_code_2_and_after_sigkill_it_starts(tmp_path):
    arguments = (*TINY, "--config.train.steps=100000", "--config.checkpoint.every_steps=100000")
    arguments = (*arguments, f"--workdir={tmp_path}")
    first = start(*arguments)
    while not first.stdout.readline().startswith("step "):
        assert first.poll() is None
    code, out, err = run(*TINY, "--config.train.steps=5", f"--workdir={tmp_path}")
    assert code == 2 and err.startswith(f"error: --workdir={tmp_path} is in use by process {first.pid} on ")
    assert err.count("\n") == 1 and out == ""
    assert first.poll() is None
    first.kill()
    first.communicate()
    code, out, err = run(*TINY, "--config.train.steps=5", f"--workdir={tmp_path}")
    assert code == 0, out + err
    assert not (tmp_path / lock.NAME).exists()
