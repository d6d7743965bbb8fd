"""Starts an ablation's runs, one process at a time, and reads their outcomes."""

import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from mae_jax.interop.transfer import PICTURES
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import StopSignal
from mae_jax.settings.fields import flatten
from mae_jax.tasks.ablation.jobs import Run, full_command
from mae_jax.workdir.writing import read_object, write_atomically, write_json

POLL_SECONDS = 0.2
DIE_WITH_PARENT = 1  # Linux: PR_SET_PDEATHSIG
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# Settings that may differ between attempts of a run: they affect how it runs and what it logs, not its result.
FREE = (
    "ablate.", "shard", "given", "file", "mesh.", "checkpoint.", "data.num_threads", "data.num_workers",
    "data.prefetch_batches", "data.path", "data.max_pixels", "train.log_every_steps", "train.profile_steps",
    "train.accumulate_steps", "model.remat", "model.scan_unroll", "evaluate.pictures", "evaluate.every_steps",
)  # fmt: skip
THEIRS = {"pretrain": (), "classify": ("model.", "classifier.num_classes")}
SETTLED = ("model.dtype", "data.batch_size")  # if None, the run chooses them and records its choice


class Outcome(NamedTuple):
    """The state of a run, read from its folder."""

    scores: dict[str, float] | None  # None: not finished
    seconds: float | None  # total time of its processes, if an ablation started them
    error: str | None  # why the last attempt failed


def read_outcome(run: Run) -> Outcome:
    """The outcome of a run so far. Scores of a measuring run start with the protocol's name."""
    status, result = read_object(run.folder / "status.json") or {}, read_object(run.folder / "result.json")
    scores = None if result is None else _name_scores(run, result)
    seconds, error = status.get("seconds"), status.get("error")
    failed = isinstance(error, str) and scores is None
    return Outcome(scores, seconds if _is_number(seconds) else None, error if failed else None)


def _name_scores(run: Run, result: dict[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in result.items() if _is_number(value) and key != "step"}
    if run.after is None:
        return {key: value for key, value in numbers.items() if key.split("/")[0] not in run.measured_by}
    own = f"{run.config.task}/"
    return {f"{run.name}/{key.removeprefix(own).removeprefix('eval/')}": value for key, value in numbers.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_same_settings(run: Run) -> None:
    """Raises UserError if the folder holds a run with other settings."""
    old = flatten(read_object(run.folder / "config.json") or {})
    new = flatten(json.loads(json.dumps(run.config.to_dict())))
    given = {argument.split("=", 1)[0].removeprefix("--config.") for argument in run.arguments}
    # Settings that the checkpoint or the data decide, unless the command does.
    theirs = PICTURES if run.config.init_from else ()
    theirs += THEIRS.get(run.config.task, ("model.", "data.", "classifier."))
    for key, value in new.items():
        settled = (value is None and key in SETTLED) or (run.after and key == "init_from")
        if old.get(key, value) == value or settled or key.startswith(FREE):
            continue
        if key in given or not key.startswith(theirs):
            raise UserError(
                f"{run.folder} was made with {key}={old[key]!r}, now it is {value!r}: one table cannot have both; "
                "choose another --workdir"
            )


def execute(run: Run, stop: StopSignal) -> Outcome:
    """Runs a process to its end; writes command.txt, log.txt (its output) and status.json to the run's folder.

    Signals must be deferred; they are passed on to the process, which saves.
    """
    command, folder = full_command(run), run.folder
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "command.txt", shlex.join(command) + "\n")
    before, start = read_outcome(run).seconds or 0.0, time.perf_counter()
    with (folder / "log.txt").open("ab+") as log:
        said_before = log.seek(0, os.SEEK_END)
        # In a session of its own, a Ctrl-C reaches it only once, from here.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_end_with_parent if LIBC else None,
        )  # fmt: skip
        code = _wait(process, stop)
        log.seek(said_before)
        said = log.read().decode(errors="replace").splitlines()
    if code == 2 and any(f"--workdir={folder} is in use by" in line for line in said):
        return Outcome(None, None, None)  # by another ablation, which records the outcome
    stopped = stop.received is not None and code != 0
    finished = code == 0 and (folder / "result.json").exists()
    error = None if finished or stopped else explain(code, said)
    write_json(folder / "status.json", {"seconds": before + time.perf_counter() - start, "error": error})
    return read_outcome(run)


def _wait(process: subprocess.Popen, stop: StopSignal) -> int:
    handed_on = False
    try:
        while process.poll() is None:
            if stop.received is not None and not handed_on:
                process.send_signal(stop.received)
                handed_on = True
            time.sleep(POLL_SECONDS)
    except BaseException:  # a second Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode


def _end_with_parent() -> None:
    """Runs between fork and exec: if this process is killed, the child gets SIGTERM, saves and stops."""
    LIBC.prctl(DIE_WITH_PARENT, signal.SIGTERM)


def explain(code: int, said: list[str]) -> str:
    """Why a process failed, in one line, from its exit code and its output."""
    if errors := [line for line in said if line.startswith("error: ")]:
        return errors[-1].removeprefix("error: ")
    if code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return f"stopped by signal {code - 128}, which the ablation did not get; the same command resumes it"
    if code < 0:
        return f"killed by signal {-code}{' (out of memory?)' if -code == signal.SIGKILL else ''}"
    if code == 0:
        return "it ended without a result"
    last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
    return f"exit code {code}: {last}"[:300]
