"""Runs an ablation: pre-trains and measures each cell of a grid with each seed, then writes a table and a plot."""

import shlex
import statistics
from pathlib import Path

import ml_collections
from tqdm import tqdm

from mae_jax.runtime.console import say
from mae_jax.runtime.signals import Stopped, StopSignal
from mae_jax.tasks.ablation import jobs
from mae_jax.tasks.ablation.execution import check_same_settings, execute, read_outcome
from mae_jax.tasks.ablation.grid import parse_grid, parse_shard
from mae_jax.tasks.ablation.jobs import Plan
from mae_jax.tasks.ablation.plot import draw, make_panels, make_paper_panels
from mae_jax.tasks.ablation.table import draw_csv, draw_markdown, make_rows, show, summarize_values
from mae_jax.workdir.folder import LOCK, check_paths, keep_earlier_measurement, locked
from mae_jax.workdir.writing import finite_or_null, save_picture, write_atomically, write_json

TABLE_LOCK = ".lock_table"  # for shards that start or end at the same time


def lock_name(config: ml_collections.ConfigDict) -> str:
    """Shards share the workdir; only one process may run each shard."""
    index, count = parse_shard(config.shard)
    return LOCK if count == 1 else f"{LOCK}_{index}_of_{count}"


def make_plan(config: ml_collections.ConfigDict, workdir: Path) -> Plan:
    """See `jobs.make_plan`; main.py calls this before it makes a folder."""
    make_paper_panels(config.ablate.paper)
    return jobs.make_plan(config, workdir)


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Executes the unfinished runs, one after the other, then writes the table of all finished ones.

    A failed run does not stop the rest; restarting the ablation tries it again. result.json appears when all runs of
    all shards have finished or failed. Raises UserError, before anything runs, for wrong settings or a run in the
    workdir with other settings; Stopped after a signal, when the current run has saved.
    """
    plan = make_plan(config, workdir)
    for one in plan.runs:
        check_paths(one.folder)
        check_same_settings(one)
    make_runs(plan, workdir, stop)
    with locked(workdir, TABLE_LOCK, wait=True):
        report(config, plan, workdir)


def describe_plan(plan: Plan) -> str:
    """The commands of this shard's runs, one a line."""
    return "\n".join(shlex.join(jobs.full_command(one)) for one in plan.own)


def make_runs(plan: Plan, workdir: Path, stop: StopSignal) -> None:
    """Executes this shard's unfinished runs and prints two lines for each."""
    to_do = [one for one in plan.own if read_outcome(one).scores is None]
    total, finished = len(plan.own), len(plan.own) - len(to_do)
    if not to_do:
        return say(f"{workdir} is finished: all {finished} runs are done")
    say(f"{len(to_do)} runs to make{f', {finished} are done' if finished else ''} -> {workdir}")
    with locked(workdir, TABLE_LOCK, wait=True):
        keep_earlier_measurement(workdir, {})  # it lacks the new runs
    absent, seconds = set(), []
    for number, one in enumerate(to_do, start=finished + 1):
        place = f"[{number}/{total}] {one.cell}, seed {one.seed}: {one.name}"
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
        seconds.append(outcome.seconds)
        scores = outcome.scores or {}
        found = [f"{name} {show(name, summarize_values([scores[name]]))}" for name in plan.scores if name in scores]
        how = f"failed: {outcome.error}; see {one.folder}/log.txt" if outcome.error else ", ".join(found) or "done"
        left = statistics.fmean(seconds) * (total - number)
        say(f"  {how}  ({tqdm.format_interval(outcome.seconds)}; about {tqdm.format_interval(left)} left)")


def report(config: ml_collections.ConfigDict, plan: Plan, workdir: Path) -> None:
    """Writes, prints and plots the scores so far."""
    ablate = config.ablate
    rows = make_rows(plan, plan.scores, read_outcome)
    table = draw_markdown(rows, plan.axes, plan.scores)
    write_atomically(workdir / "table.md", table)
    write_atomically(workdir / "table.csv", draw_csv(rows, plan.axes, plan.scores))
    files = ["table.md", "table.csv"]
    if panels := make_panels(plan, make_rows(plan, ablate.plot, read_outcome), ablate.plot):
        # If the command line changes the axes, the file's title and curves no longer fit.
        axes = parse_grid(jobs.resolve([f"--config={config.file}"]).ablate.grid)
        others = [axis.keys for axis in plan.axes] != [axis.keys for axis in axes]
        paper, title, source = (
            "" if others and f"ablate.{name}" not in config.given else ablate[name]
            for name in ("paper", "title", "source")
        )
        x_label = ", ".join(axis.title for axis in plan.axes)
        save_picture(workdir / "plot.png", draw(panels, make_paper_panels(paper), x_label, title, source))
        files.append("plot.png")
    say("", *table.split("\n"))
    if failed := sum(len(row["failed"]) for row in rows):
        say(f"{failed} of {len(rows) * len(plan.seeds)} runs failed; the same command tries them again")
    if missing := sum(row["missing"] > 0 for row in rows):
        say(f"{missing} of {len(rows)} cells are incomplete: other shards or the same command will complete them")
    else:
        result = {"rows": [{key: row[key] for key in row if key not in ("labels", "missing")} for row in rows]}
        result = finite_or_null(result)
        keep_earlier_measurement(workdir, result)
        write_json(workdir / "result.json", result)
        files.append("result.json")
    say(f"see {', '.join(f'{workdir}/{name}' for name in files)}")
