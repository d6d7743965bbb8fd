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
from mae_jax.workdir import folder
from mae_jax.workdir.folder import locked
from tests.runs import ROOT, TINY, run

HOLD = """
import sys, pathlib; from mae_jax.workdir.folder import locked
with locked(pathlib.Path(sys.argv[1])): print(1); input()"""


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A folder, and the process that holds its lock."""
    workdir = tmp_path_factory.mktemp("held")
    command = [sys.executable, "-uc", HOLD, str(workdir)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "1\n"
    yield workdir, process
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_with_process_host_and_start_of_the_first(held):
    workdir, holder = held
    with pytest.raises(UserError) as error, locked(workdir):
        pass
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"--workdir={workdir} is in use by process {holder.pid} on ")
    assert socket.gethostname() in message and f"which started {time.strftime('%Y-%m-')}" in message


@pytest.mark.slow
def test_a_second_run_ends_with_code_2_and_one_line_and_the_first_keeps_the_lock(held):
    workdir, holder = held
    code, out, err = run(*TINY, "--config.train.steps=5", f"--workdir={workdir}")
    assert code == 2 and err.startswith(f"error: --workdir={workdir} is in use by process {holder.pid} on ")
    assert err.count("\n") == 1 and out == ""
    assert (workdir / folder.LOCK).exists()


def test_the_lock_goes_with_its_process_even_if_that_is_killed(held):
    workdir, holder = held
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (workdir / folder.LOCK).exists(), "what a killed run leaves"
    with locked(workdir):
        pass
    assert list(workdir.iterdir()) == [], "nothing of it stays when a run ends"


def test_a_lock_whose_file_was_deleted_before_it_was_got_is_got_again(tmp_path, monkeypatch):
    lockf = fcntl.lockf

    def lock_late(file, how):  # the run before ended, and deleted the file, between open and lock
        monkeypatch.setattr(fcntl, "lockf", lockf)
        (tmp_path / folder.LOCK).unlink()
        lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", lock_late)
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / folder.LOCK).read_text()


def test_a_lock_that_is_a_link_a_folder_or_a_pipe_is_one_line(tmp_path):
    make = {"link": lambda path: path.symlink_to(target), "folder": os.mkdir, "pipe": os.mkfifo}
    target = tmp_path / "target"
    for kind, make_path in make.items():
        (tmp_path / kind).mkdir()
        make_path(tmp_path / kind / folder.LOCK)
        with pytest.raises(UserError, match=r"lock cannot be a run.s lock \(.*\): delete it"), locked(tmp_path / kind):
            pass
    assert not target.exists()


@pytest.mark.parametrize("text", ["precious", '{"name": "package"}', "[1]"])
def test_a_file_of_that_name_of_something_else_is_neither_overwritten_nor_deleted(tmp_path, text):
    (tmp_path / folder.LOCK).write_text(text)
    with pytest.raises(UserError, match=r"\.lock is not the lock of a run: delete it"), locked(tmp_path):
        pass
    assert (tmp_path / folder.LOCK).read_text() == text


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, capsys, code):
    def lockf(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path):
        out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"cannot be locked ({os.strerror(code)})" in out
