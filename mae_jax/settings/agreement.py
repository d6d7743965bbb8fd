"""What must be the same in all processes of a run, found out before they wait for one another in vain."""

import secrets
import time
from pathlib import Path

import jax
import ml_collections

from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import from_main, is_main, process_count, wait_for_all
from mae_jax.settings.fields import flatten

# What may differ from host to host.
OWN = ("data.path", "data.num_threads", "data.num_workers", "data.prefetch_batches", "given")
SEEN_SECONDS = 10  # until a file that one host writes is there for the others: network file systems cache


def check_same_command(config: ml_collections.ConfigDict) -> None:
    """Raises UserError if this process has other settings than process 0."""
    if process_count() == 1:
        return
    own = flatten(config.to_dict())
    for key, value in from_main(own).items():
        if key not in OWN and own.get(key) != value:
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
    wait_for_all("workdir")
    deadline = time.monotonic() + SEEN_SECONDS
    while not note.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir={workdir} of process {jax.process_index()} is not that of process 0: "
                "give a folder that all hosts share"
            )
        list(workdir.iterdir())  # makes a network file system look again
        time.sleep(0.5)
    wait_for_all("workdir seen")
    if is_main():
        note.unlink()
