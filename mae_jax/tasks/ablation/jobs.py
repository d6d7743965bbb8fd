"""The runs of an ablation and their commands, planned and checked before the first one starts."""

import functools
import itertools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from mae_jax.evaluation.unseen import PLACE
from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import PATHS, unused_with
from mae_jax.settings.command_line import check_command_line, given_settings
from mae_jax.settings.fields import flatten, get
from mae_jax.settings.registry import nearest
from mae_jax.tasks import check_task
from mae_jax.tasks.ablation import grid
from mae_jax.tasks.ablation.grid import RESERVED, Axis, Cell, Protocols, split_key
from mae_jax.workdir.writing import read_object

ROOT = Path(__file__).parents[3]
# Settings that a measuring run takes from its cell's pre-training: where the pictures and the devices are.
SHARED = (
    "data.path", "data.num_threads", "data.num_workers", "data.prefetch_batches", "data.on_bad_image",
    "mesh.data", "mesh.fsdp", "mesh.tensor",
)  # fmt: skip
# Also taken, if the command sets data.name.
PLACES = tuple(f"data.{name}" for name in (*PLACE, "bands", "dtype", "value_range"))
LONGEST_NAME = 200  # of a folder; file systems allow 255 bytes
# Scores by task; those of measuring tasks go under the protocol's name.
PRETRAINED = ("knn/top1", "linear_probe/top1", "rankme")
SCORES = {
    "pretrain": ("eval/loss", *PRETRAINED, *(f"random_encoder/{name}" for name in PRETRAINED)),
    "classify": ("top1", "top5", "loss"),
    "knn": ("top1", "best_top1", "rankme"),
    "logistic_regression": ("top1", "top5", "best_top1"),
    "probe_sweep": ("top1", "top5", "held_out_top1"),
    "evaluate": ("loss",),
}


def scores_of(config: ConfigDict) -> tuple[str, ...]:
    """The scores of a run, the first of which stands for it."""
    if config.task == "few_shot":
        return tuple(f"{count}_shot/top1" for count in config.evaluate.shots)
    return SCORES[config.task]


class Run(NamedTuple):
    name: str  # "pretrain" or a protocol
    cell: str  # the first cell that needs it
    seed: int
    folder: Path
    after: Path | None  # folder of the run that must finish first
    arguments: tuple[str, ...]  # of main.py
    config: ConfigDict  # as main.py resolves the arguments
    measured_by: tuple[str, ...] = ()  # for pre-training: its protocols, whose scores it leaves to them


class Plan(NamedTuple):
    axes: list[Axis]
    cells: list[Cell]
    seeds: tuple[int, ...]
    runs: list[Run]  # of all shards, in order
    own: list[Run]  # of this shard
    needed: dict[tuple[str, int], list[Run]]  # by cell name and seed; cells may share runs
    scores: tuple[str, ...]  # columns of the table


def make_plan(config: ConfigDict, workdir: Path) -> Plan:
    """Plans an ablation; writes nothing. UserError for a mistake in `ablate`, the shard or a cell's settings."""
    ablate = config.ablate
    index, count = grid.parse_shard(config.shard)
    for key in {"seed", "data.seed"} & set(config.given):
        raise UserError(f"--config.{key} is set by ablate.seeds; give --config.ablate.seeds='({get(config, key)},)'")
    seeds = tuple(dict.fromkeys(ablate.seeds))
    if not seeds or not all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds):
        raise UserError(f"ablate.seeds={seeds} must be one or more whole numbers, for example '(0, 1, 2)'")
    grid.check_curves(ablate.paper)
    known = list(flatten(config.to_dict()))
    axes = grid.parse_grid(ablate.grid)
    protocols = grid.parse_protocols(ablate.measure, {*known, *(key.split(".")[0] for key in known)})
    grid.check_keys(axes, protocols, known)
    for key in (key for axis in axes for key in axis.keys if key in config.given):
        raise UserError(f"--config.{key} is what ablate.grid varies: change --config.ablate.grid, or leave it out")
    cells, by_folder, needed = grid.make_cells(axes), {}, {}
    for cell, seed in itertools.product(cells, seeds):
        needed[cell.name, seed] = []
        for run in make_runs(config, axes, cell, protocols, seed, workdir.absolute()):
            same = by_folder.setdefault(str(run.folder).casefold(), run)
            if same.arguments != run.arguments:
                remedy = "give the values of ablate.grid names that differ in letters or digits"
                raise UserError(f"cells {same.cell!r} and {run.cell!r} would share the folder {same.folder}; {remedy}")
            needed[cell.name, seed].append(same)
    runs = list(by_folder.values())
    check_scores(ablate, runs)
    # Cells that share their pre-training belong to one shard.
    first = [run.folder for run in runs if run.after is None]
    own = [run for run in runs if first.index(run.after or run.folder) % count == index]
    # A protocol without a column gets one for its first score.
    named = {score.split("/")[0] for score in ablate.scores}
    unnamed = {run.name: scores_of(run.config)[0] for run in runs if run.after and run.name not in named}
    scores = (*ablate.scores, *(f"{name}/{score}" for name, score in unnamed.items()))
    return Plan(axes, cells, seeds, runs, own, needed, scores)


def make_runs(
    config: ConfigDict, axes: list[Axis], cell: Cell, protocols: Protocols, seed: int, workdir: Path
) -> list[Run]:
    """A cell's runs for one seed: pre-training, then its protocols. A UserError names the cell."""
    varied = {owner: {} for owner in ("pretrain", *protocols)}
    for key, value in cell.settings.items():
        owner, own = split_key(key, protocols)
        varied[owner][own] = value

    def make_run(name: str, start: list[str], settings: dict, after: Path | None, measured_by: tuple = ()) -> Run:
        """Its folder is named by the axes that affect it: cells that differ only in other axes share it."""
        affects = [any(split_key(key, protocols)[0] in ("pretrain", name) for key in axis.keys) for axis in axes]
        parts = "__".join(grid.safe_name(part) for part in itertools.compress(cell.names, affects))
        if len(parts.encode()) > LONGEST_NAME:
            raise UserError("its name is too long for a folder; give the values of ablate.grid shorter names")
        folder = workdir / (parts or "all_cells") / f"seed_{seed}" / name
        settings = settings | varied[name] | {"seed": seed, "data.seed": seed}
        paths = [key for key in PATHS if isinstance(settings.get(key), str) and "://" not in settings[key]]
        settings |= {key: os.path.abspath(os.path.expanduser(settings[key])) for key in paths}
        given = (f"--config.{key}={value}" for key, value in settings.items())
        arguments = (*start, *given, f"--workdir={folder}")
        return Run(name, cell.name, seed, folder, after, arguments, resolve(arguments), measured_by)

    try:
        given = {key: get(config, key) for key in config.given if key not in RESERVED and not key.startswith("ablate.")}
        start = [f"--config={config.file}", "--config.task=pretrain"]
        runs = [make_run("pretrain", start, given, None, tuple(protocols))]
        trained, pretrain = runs[0].config, runs[0].folder
        taken = SHARED + (PLACES if "data.name" in config.given else ())
        taken = [key for key in taken if not unused_with(trained, key)]
        for name, (measuring, overrides) in protocols.items():
            usual = protocol_settings(measuring)
            shared = {key: get(trained, key) for key in taken if get(trained, key) != get(usual, key)}
            start = [f"--config={ROOT}/configs/{measuring}.py", f"--config.init_from={pretrain}"]
            runs.append(make_run(name, start, shared | overrides, pretrain))
            blocks, depth = runs[-1].config.classifier.trained_blocks, trained.model.depth
            if blocks is not None and blocks > depth:
                raise UserError(f"{name}.classifier.trained_blocks={blocks} is more than model.depth={depth}")
    except UserError as error:
        raise UserError(f"cell {cell.name!r}: {error}") from error
    return runs


def full_command(run: Run) -> list[str]:
    """The command that starts a run, from any folder."""
    return [sys.executable, str(ROOT / "main.py"), *run.arguments]


def resolve(arguments: tuple[str, ...] | list[str]) -> ConfigDict:
    """The settings main.py would use; UserError where it would exit with code 2."""
    check_command_line(list(arguments))
    values = flags.FlagValues()
    argv = ["main.py", *arguments]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:  # a value of the wrong type
        raise UserError(str(error).splitlines()[0]) from error
    config.value.given = given_settings(argv)
    check_task(config.value)
    return config.value


@functools.cache
def protocol_settings(name: str) -> ConfigDict:
    """The settings of configs/NAME.py; UserError if it does not exist or its task has no scores for a table."""
    config = resolve([f"--config={ROOT}/configs/{name}.py", "--config.init_from=PRETRAINED"])
    tasks = ["few_shot", *(task for task in SCORES if task != "pretrain")]
    if config.task not in tasks:
        raise UserError(f"ablate.measure: configs/{name}.py has the task {config.task}, not one of {', '.join(tasks)}")
    return config


def check_scores(ablate: ConfigDict, runs: list[Run]) -> None:
    """Raises UserError for a score in `ablate.scores` or `ablate.plot` that no run measures."""
    if any(":" in name for run in runs for name in run.config.evaluate.evaluators):
        return  # custom evaluators name their own scores
    known = set(SCORES["pretrain"])
    known |= {f"{run.name}/{score}" for run in runs if run.after for score in scores_of(run.config)}
    for score in (*ablate.scores, *ablate.plot):
        if score not in known:
            there = ", ".join(sorted(known))
            raise UserError(
                f"ablate.scores, ablate.plot: no run measures {score!r}{nearest(score, known)}; take {there}"
            )


class Outcome(NamedTuple):
    scores: dict[str, float] | None  # None: not finished
    seconds: float | None  # total time of its processes, if an ablation started them
    error: str | None  # why the last attempt failed


def read_outcome(run: Run) -> Outcome:
    """The outcome of a run so far. Scores of a measuring run start with the protocol's name."""
    status, result = read_object(run.folder / "status.json") or {}, read_object(run.folder / "result.json")
    seconds = status["seconds"] if _is_number(status.get("seconds")) else None
    if result is None:
        error = status.get("error")
        return Outcome(None, seconds, error if isinstance(error, str) else None)
    scores = {key: value for key, value in result.items() if _is_number(value) and key != "step"}
    if run.after:
        own = f"{run.config.task}/"
        scores = {f"{run.name}/{key.removeprefix(own).removeprefix('eval/')}": scores[key] for key in scores}
    return Outcome({k: v for k, v in scores.items() if k.split("/")[0] not in run.measured_by}, seconds, None)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
