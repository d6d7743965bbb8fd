"""Several processes must have the same command and the same workdir; checked before they wait for one another."""

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


def check_same_command(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if this process has other settings than process 0."""
    own = flatten(config.to_dict())
    for key, value in (from_main(own) if process_count() > 1 else {}).items():
        if key not in LOCAL and own.get(key) != value:
            raise UserError(
                f"{key}={own.get(key)!r} in process {jax.process_index()}, but {value!r} in process 0: "
                "all processes take the same command"
            )


def check_shared(workdir: Path) -> None:
    """Raises UserError if this process does not see what process 0 writes into the workdir."""
    if process_count() == 1:
        return
    note = workdir / f".seen_by_all_{from_main(secrets.token_hex(8))}"
    if is_main():
        note.touch()
    wait_for_all()
    deadline = time.monotonic() + SEEN_SECONDS
    while not note.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir={workdir} of process {jax.process_index()} is not that of process 0: "
                "give a folder that all hosts share"
            )
        list(workdir.iterdir())  # makes a network file system look again
        time.sleep(0.5)
    wait_for_all()
    if is_main():
        note.unlink()
