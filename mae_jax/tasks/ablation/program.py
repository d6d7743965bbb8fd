"""Runs an ablation: pre-trains and measures each cell of a grid with each seed, then writes a table and a plot."""

import ctypes
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from ml_collections import ConfigDict
from tqdm import tqdm

from mae_jax.interop.transfer import PICTURES
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import Stopped, StopSignal
from mae_jax.settings.command_line import given_settings
from mae_jax.settings.fields import flatten
from mae_jax.tasks.ablation.grid import parse_shard
from mae_jax.tasks.ablation.jobs import Outcome, Plan, Run, full_command, make_plan, read_outcome
from mae_jax.tasks.ablation.report import report, show, summarize_values
from mae_jax.workdir.folder import LOCK, check_paths, keep_earlier_measurement, locked
from mae_jax.workdir.writing import read_object, write_atomically, write_json

TABLE_LOCK = ".lock_table"  # for shards that start or end at the same time
POLL_SECONDS = 0.2
DIE_WITH_PARENT = 1  # Linux's PR_SET_PDEATHSIG: if the ablation is killed, its run gets a signal, saves and stops
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# Settings that may differ between attempts of a run: they affect how it runs and what it logs, not its result.
FREE = (
    "ablate.", "shard", "given", "file", "mesh.", "checkpoint.", "data.num_threads", "data.num_workers",
    "data.prefetch_batches", "data.path", "data.max_pixels", "train.log_every_steps", "train.profile_steps",
    "train.accumulate_steps", "model.remat", "model.scan_unroll", "evaluate.pictures", "evaluate.every_steps",
)  # fmt: skip
THEIRS = {"pretrain": (), "classify": ("model.", "classifier.num_classes")}
# If None, the run chooses them and records its choice.
SETTLED = ("model.dtype", "model.attention", "data.batch_size", "data.dtype")
MEASURED = ("data.value_range", "data.mean", "data.std")  # data.statistics may decide them


def lock_name(config: ConfigDict) -> str:
    """Shards share the workdir; only one process may run each shard."""
    index, count = parse_shard(config.shard)
    return LOCK if count == 1 else f"{LOCK}_{index}_of_{count}"


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Makes a shard's runs and the table. UserError: before the first; Stopped: when one has saved."""
    plan = make_plan(config, workdir)
    for one in plan.runs:
        check_paths(one.folder)
        check_same_settings(one)
    make_runs(plan, workdir, stop)
    with locked(workdir, TABLE_LOCK, wait=True):
        report(config, plan, workdir)


def make_runs(plan: Plan, workdir: Path, stop: StopSignal) -> None:
    """Makes a shard's unfinished runs and prints two lines for each. A failed one does not stop the rest."""
    to_do = [one for one in plan.own if read_outcome(one).scores is None]
    finished = len(plan.own) - len(to_do)
    if not to_do:
        return say(f"{workdir} is finished: all {finished} runs are done")
    say(f"{len(to_do)} runs to make, {finished} are done -> {workdir}")
    with locked(workdir, TABLE_LOCK, wait=True):
        keep_earlier_measurement(workdir, {})  # it lacks the new runs
    absent = set()
    for number, one in enumerate(to_do, start=finished + 1):
        place = f"[{number}/{len(plan.own)}] {one.cell}, seed {one.seed}: {one.name}"
        if one.after in absent:
            say(f"{place} left out, since its pre-training is not there")
            continue
        say(place)
        with stop.deferred():
            outcome = execute(one, stop)
        if stop.received is not None:
            say(f"stopped; {one.folder} goes on when the ablation is started again")
            raise Stopped
        if outcome.scores is None:
            absent.add(one.folder)
        if outcome.seconds is None:
            say("  another process is working on it")
            continue
        scores = {name: outcome.scores[name] for name in plan.scores if name in (outcome.scores or ())}
        found = ", ".join(f"{name} {show(name, summarize_values([score]))}" for name, score in scores.items())
        how = f"failed: {outcome.error}; see {one.folder}/log.txt" if outcome.error else found or "done"
        say(f"  {how}  ({tqdm.format_interval(outcome.seconds)})")


def check_same_settings(run: Run) -> None:
    """Raises UserError if the folder holds a run with other settings."""
    old = flatten(read_object(run.folder / "config.json") or {})
    new = flatten(json.loads(json.dumps(run.config.to_dict())))
    given, data = given_settings(list(run.arguments)), run.config.data
    # Settings that the checkpoint or the data decide, unless the command does.
    theirs = PICTURES if run.config.init_from else ()
    theirs += THEIRS.get(run.config.task, ("model.", "data.", "classifier."))
    for key, value in new.items():
        settled = (value is None and key in SETTLED) or (run.after and key == "init_from")
        settled = settled or (key in MEASURED and (data.statistics or data.name == "prepared"))
        if old.get(key, value) == value or settled or key.startswith(FREE):
            continue
        if key in given or not key.startswith(theirs):
            raise UserError(
                f"{run.folder} was made with {key}={old[key]!r}, now it is {value!r}: one table cannot have both; "
                "choose another --workdir"
            )


def execute(run: Run, stop: StopSignal) -> Outcome:
    """Runs a process to its end; writes command.txt, log.txt (its output) and status.json to the run's folder.

    Signals must be deferred; the first is passed on to the process, which saves.
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
            preexec_fn=LIBC and functools.partial(LIBC.prctl, DIE_WITH_PARENT, signal.SIGTERM),
        )  # fmt: skip
        try:
            while process.poll() is None and stop.received is None:
                time.sleep(POLL_SECONDS)
            if stop.received is not None:
                process.send_signal(stop.received)
            code = process.wait()
        except BaseException:  # a second Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
            raise
        log.seek(said_before)
        said = log.read().decode(errors="replace").splitlines()
    if code == 2 and any(f"--workdir={folder} is in use by" in line for line in said):
        return Outcome(None, None, None)  # by another ablation, which records the outcome
    stopped = stop.received is not None and code != 0
    finished = code == 0 and (folder / "result.json").exists()
    error = None if finished or stopped else explain(code, said)
    write_json(folder / "status.json", {"seconds": before + time.perf_counter() - start, "error": error})
    return read_outcome(run)


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
    return f"exit code {code}: {([line.strip() for line in said if line.strip()] or ['it said nothing'])[-1]}"[:300]
