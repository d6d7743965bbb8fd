"""A workdir before a run: the lock, whether it belongs to a run, which files of an earlier one to keep."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, reason
from mae_jax.runtime.processes import is_main
from mae_jax.workdir.writing import free_name, parse_object, read_object

# Files by which another program's folder is recognised, and others of a run, a measurement or an ablation.
TYPICAL = (
    "config.json", "metrics.jsonl", "metrics.png", "classes.csv", "confusion_matrix.png", "train_features.npy",
    "train_labels.npy", "eval_features.npy", "eval_labels.npy",
)  # fmt: skip
FILES = (
    *TYPICAL, "result.json", "init_from.json", "wandb_run.txt", "mlflow_run.txt", "table.md", "table.csv", "plot.png",
    "command.txt", "log.txt", "status.json",
)  # fmt: skip
FOLDERS = ("checkpoints", "checkpoints_set_aside", "reconstructions", "profile")

LOCK = ".lock"
REMEDY = "delete it if no run uses the workdir, or choose another --workdir"
# A file system without locks, or without room for a file: the run goes on without a lock.
IMPOSSIBLE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def locked(workdir: Path, name: str = LOCK, wait: bool = False) -> Iterator[None]:
    """A context in which no other run uses the workdir (or a part, `name`): waits for it, or UserError."""
    file = None
    if is_main():
        try:
            file = _lock(workdir / name, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in IMPOSSIBLE:
                raise
            say(f"{workdir} cannot be locked ({reason(error)}): a second run would not be refused")
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                (workdir / name).unlink()  # while locked: no other run can have it
            os.close(file)


def _lock(path: Path, how: int) -> int:
    while True:
        with contextlib.ExitStack() as stack:
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
                stack.callback(os.close, file)
                text = os.pread(file, 4096, 0)
            except OSError as error:  # another user's, a link, a folder, a pipe
                if error.errno not in (errno.EACCES, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ESPIPE):
                    raise
                raise UserError(f"{path} cannot be a run's lock ({reason(error)}): {REMEDY}") from error
            owner = parse_object(text) or {}
            if text and "host" not in owner:  # locking would overwrite and delete it
                raise UserError(f"{path} is not the lock of a run: {REMEDY}")
            try:
                fcntl.lockf(file, how)
            except (BlockingIOError, PermissionError) as error:
                known = {"process", "host", "started"} <= owner.keys()  # the owner may be writing it now
                other = "process {process} on {host}, which started {started}" if known else "another run"
                raise UserError(
                    f"--workdir={path.parent} is in use by {other.format_map(owner)}; wait for it, stop it, or choose "
                    "another folder"
                ) from error
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile by a run that ended
                if os.path.samestat(os.fstat(file), path.stat()):
                    started = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
                    owner = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
                    with contextlib.suppress(OSError):  # a full disk: the lock still holds
                        os.ftruncate(file, 0)
                        os.pwrite(file, json.dumps(owner).encode() + b"\n", 0)
                    stack.pop_all()
                    return file


def check_folder(workdir: Path, task: str) -> None:
    """Raises UserError for links, for a file in place of a folder or vice versa, and for another program's folder."""
    if task == "export":  # it checks its folder itself
        return
    check_paths(workdir)
    if task == "ablate":  # it writes no config.json
        return
    versions = (read_object(workdir / "config.json") or {}).get("versions")
    ours = isinstance(versions, dict) and "jax" in versions or any(workdir.glob("checkpoints/*/about/metadata"))
    for path in (workdir / name for name in TYPICAL):
        if not ours and path.exists() and path.stat().st_size:
            raise UserError(
                f"--workdir={workdir} is not a run's workdir: {path.name} is another program's; choose another folder"
            )


def check_paths(workdir: Path) -> None:
    """Raises UserError if something else is at the path of a file or folder of a run."""
    for name in (*FILES, *FOLDERS):
        path = workdir / name
        kind, right = ("folder", path.is_dir()) if name in FOLDERS else ("file", path.is_file())
        if path.is_symlink() and not (right and name == "checkpoints"):  # which may be on a larger disk
            raise UserError(f"{path} is a link, which a run does not follow: remove it, or choose another --workdir")
        if path.exists() and not right:
            raise UserError(f"{path} is not a {kind}, as a run needs: move it away, or choose another --workdir")


def keep_earlier_run(workdir: Path) -> None:
    """Renames metrics, result and pictures, but not event files, of an earlier run without checkpoints; says so."""
    for path in (workdir / name for name in ("metrics.jsonl", "metrics.png", "result.json", "reconstructions")):
        if is_main() and path.exists():
            kept = path.rename(free_name(path))
            say(f"the run begins at step 0: {path} of an earlier one is kept as {kept.name}")


def keep_earlier_result(workdir: Path, step: int) -> None:
    """Renames the result of a shorter run, which goes on from `step`, to result.<step>.json (or with a number)."""
    if is_main() and (result := workdir / "result.json").exists():
        result.rename(free_name(workdir / f"result.{step}.json"))


def keep_earlier_measurement(workdir: Path, new: dict[str, Any]) -> None:
    """Renames an earlier, different result to result.1.json, or the next free number."""
    result = workdir / "result.json"
    if is_main() and result.exists() and read_object(result) != json.loads(json.dumps(new)):
        result.rename(free_name(result))
