"""What an ablation comes to: a row for each cell, as data, Markdown and CSV."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import train_flops
from mae_jax.tasks.ablation.execution import Outcome
from mae_jax.tasks.ablation.grid import Axis
from mae_jax.tasks.ablation.jobs import Plan, Run


def make_rows(plan: Plan, scores: tuple[str, ...], outcome: Callable[[Run], Outcome]) -> list[dict[str, Any]]:
    """A row for each cell: {"cell", "labels", "settings", "seeds", "scores", "train_gflop_per_image", "minutes",
    "failed", "missing"}.

    A score has mean, std (of the sample, None for one value) and the values of the seeds that have it. Minutes are the
    mean over the seeds of what the cell's runs took together; runs that cells share count in each.
    """
    rows = []
    for cell in plan.cells:
        runs_of = {seed: plan.needed[cell.name, seed] for seed in plan.seeds}
        failed, missing, minutes, values = {}, 0, [], {score: [] for score in scores}
        for seed, runs in runs_of.items():
            ends = [outcome(run) for run in runs]
            found = {}
            for end in ends:
                found |= end.scores or {}
            for score in scores:
                if score in found:
                    values[score].append(found[score])
            if ends[0].error:  # the others cannot begin
                failed[f"seed {seed}"] = f"pretrain: {ends[0].error}"
            else:
                errors = [f"{run.name}: {end.error}" for run, end in zip(runs, ends, strict=True) if end.error]
                failed |= {f"seed {seed}": "; ".join(errors)} if errors else {}
                missing += sum(end.scores is None and end.error is None for end in ends)
            if all(end.scores is not None and end.seconds is not None for end in ends):
                minutes.append(sum(end.seconds for end in ends) / 60)
        rows.append(
            {
                "cell": cell.name,
                "labels": list(cell.labels),
                "settings": cell.settings,
                "seeds": list(plan.seeds),
                "scores": {score: summarize_values(found) for score, found in values.items()},
                "train_gflop_per_image": mean_train_flops(runs_of[plan.seeds[0]][0].config) / 1e9,
                "minutes": statistics.fmean(minutes) if minutes else None,
                "failed": failed,
                "missing": missing,
            }
        )
    return rows


def mean_train_flops(config: ConfigDict) -> float:
    """Operations of a training image of a run, forward and backward: the mean over the run, whose images may grow."""
    model, begin, total = MAEConfig(**config.model), 0.0, 0.0
    for end, size in (*config.train.resolutions, (1.0, model.image_size)):
        total += (end - begin) * train_flops(dataclasses.replace(model, image_size=size))
        begin = end
    return total


def summarize_values(values: list[float]) -> dict[str, Any]:
    """{"mean", "std", "values"}; None where there are too few."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def is_share(score: str) -> bool:
    """Whether a score is a share of the images, which people read in per cent."""
    return "top" in score.rsplit("/", 1)[-1]


def show(score: str, summary: dict[str, Any]) -> str:
    """ "97.5 ± 0.3" or "0.3032 ± 0.0011", as a person reads it."""
    scale, digits = (100, 1) if is_share(score) else (1, 4)
    if summary["mean"] is None:
        return "–"
    parts = [summary["mean"]] + ([] if summary["std"] is None else [summary["std"]])
    return " ± ".join(f"{scale * part:.{digits}f}" for part in parts)


def draw_markdown(rows: list[dict[str, Any]], axes: list[Axis], scores: tuple[str, ...]) -> str:
    """The rows as a Markdown table, with a list of what failed or is missing under it."""
    header = [axis.title for axis in axes] + ["GFLOP an image"]
    header += [f"{score} %" if is_share(score) else score for score in scores] + ["minutes"]
    table = [header]
    for row in rows:
        marks = ["failed"] * bool(row["failed"]) + ["missing"] * bool(row["missing"])
        labels = list(row["labels"])
        labels[-1] += f" ({', '.join(marks)})" if marks else ""
        minutes = "–" if row["minutes"] is None else f"{row['minutes']:.1f}"
        flop = f"{row['train_gflop_per_image']:.3g}"
        table.append([*labels, flop, *(show(score, row["scores"][score]) for score in scores), minutes])
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    left = len(axes)

    def join(line: list[str]) -> str:
        cells = [
            text.replace("|", "\\|").ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [join(table[0]), f"| {' | '.join(rule)} |", *map(join, table[1:])]
    notes = [f"- {row['cell']}, {seed}: {why}" for row in rows for seed, why in row["failed"].items()]
    notes = [note.replace("\n", " ") for note in notes]
    return "\n".join([*lines, *(["", "Failed:", "", *notes] if notes else [])]) + "\n"


def draw_csv(rows: list[dict[str, Any]], axes: list[Axis], scores: tuple[str, ...]) -> str:
    """The rows as CSV, in full precision; of each score mean, std and n, the number of seeds that have it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{score} {part}" for score in scores for part in ("mean", "std", "n")]
    writer.writerow(["cell", *(axis.title for axis in axes), "train_gflop_per_image", "minutes", *columns, "failed"])
    for row in rows:
        found = [row["scores"][score] for score in scores]
        numbers = [number for score in found for number in (score["mean"], score["std"], len(score["values"]))]
        failed = "; ".join(f"{seed}: {why}" for seed, why in row["failed"].items())
        start = [row["cell"], *row["labels"], row["train_gflop_per_image"], row["minutes"]]
        writer.writerow(["" if value is None else value for value in (*start, *numbers, failed)])
    return text.getvalue()
