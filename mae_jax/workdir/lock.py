"""One run at a time in a workdir."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, reason
from mae_jax.runtime.processes import is_main
from mae_jax.workdir.writing import parse_object

NAME = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
UNUSABLE = (errno.EACCES, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ESPIPE)  # another user's, links, folders, pipes
REMEDY = "delete it if no run uses the workdir, or choose another --workdir"
# A file system without locks, or without room for a file: the run goes on without a lock.
IMPOSSIBLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def locked(workdir: Path, name: str = NAME, wait: bool = False) -> Iterator[None]:
    """A context in which no other run can use the workdir; process 0 holds the lock.

    The system releases it however the process ends; reader processes do not inherit it.

    Args:
      name: of the lock's file; runs with different names may share the folder.
      wait: whether to wait for another run. If not, UserError names the run that holds the lock.
    """
    if not is_main():
        yield
        return
    try:
        file = _lock(workdir / name, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in IMPOSSIBLE:
            raise
        say(f"{workdir} cannot be locked ({reason(error)}): a second run would not be refused")
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (workdir / name).unlink()  # while locked: no other run can have it
        os.close(file)


def _lock(path: Path, how: int) -> int:
    """Locks a file and writes the owner into it; returns its descriptor."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
                stack.callback(os.close, file)
                text = os.pread(file, 4096, 0)
            except OSError as error:
                if error.errno not in UNUSABLE:
                    raise
                raise UserError(f"{path} cannot be a run's lock ({reason(error)}): {REMEDY}") from error
            owner = parse_object(text) or {}
            if text and "host" not in owner:  # locking would overwrite and delete it
                raise UserError(f"{path} is not the lock of a run: {REMEDY}")
            try:
                fcntl.lockf(file, how)
            except OSError as error:
                if error.errno not in HELD:
                    raise
                known = {"process", "host", "started"} <= owner.keys()  # the owner may be writing it now
                other = "process {process} on {host}, which started {started}" if known else "another run"
                raise UserError(
                    f"--workdir={path.parent} is in use by {other.format_map(owner)}; wait for it, stop it, or choose "
                    "another folder"
                ) from error
            if _is_at(file, path):  # not deleted meanwhile by a run that ended
                started = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
                owner = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
                with contextlib.suppress(OSError):  # a full disk: the lock still holds
                    os.ftruncate(file, 0)
                    os.pwrite(file, json.dumps(owner).encode() + b"\n", 0)
                stack.pop_all()
                return file


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
