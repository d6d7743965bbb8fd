"""Checks that all processes have the same settings and the same workdir."""

import secrets
import time
from pathlib import Path

import jax
import ml_collections

from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import from_main, is_main, process_count, wait_for_all
from mae_jax.settings.fields import flatten

LOCAL = ("data.path", "data.num_threads", "data.num_workers", "data.prefetch_batches", "given")  # may differ
SEEN_SECONDS = 10  # for a file to appear on other hosts: network file systems cache


def check_agreement(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Raises UserError if this process's settings differ from process 0's, or it does not see that one's files."""
    if process_count() == 1:
        return
    own, index = flatten(config.to_dict()), jax.process_index()
    theirs, token = from_main((own, secrets.token_hex(8)))
    for key, value in theirs.items():
        if key not in LOCAL and own.get(key) != value:
            raise UserError(
                f"{key}={own.get(key)!r} in process {index}, but {value!r} in process 0: all processes need the same "
                "command"
            )
    note = workdir / f".seen_by_all_{token}"
    if is_main():
        note.touch()
    wait_for_all()
    deadline = time.monotonic() + SEEN_SECONDS
    while not note.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir={workdir} of process {index} is not that of process 0: give a folder that all hosts share"
            )
        list(workdir.iterdir())  # makes a network file system refresh its cache
        time.sleep(0.5)
    wait_for_all()
    if is_main():
        note.unlink()
