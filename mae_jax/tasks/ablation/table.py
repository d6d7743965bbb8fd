"""The table of an ablation, a row for each cell: as data, Markdown and CSV."""

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
from mae_jax.tasks.ablation.grid import Axis, Cell
from mae_jax.tasks.ablation.jobs import Plan, Run


def make_rows(plan: Plan, scores: tuple[str, ...], outcome: Callable[[Run], Outcome]) -> list[dict[str, Any]]:
    """A row for each cell: {"cell", "labels", "settings", "seeds", "scores", "train_gflop_per_image", "minutes",
    "failed", "missing"}.

    Scores are as in `summarize_values`. Minutes sum over the cell's runs, shared ones too, and average over seeds.
    """
    return [_make_row(plan, cell, scores, outcome) for cell in plan.cells]


def _make_row(plan: Plan, cell: Cell, scores: tuple[str, ...], outcome: Callable[[Run], Outcome]) -> dict[str, Any]:
    failed, missing, minutes, values = {}, 0, [], {score: [] for score in scores}
    for seed in plan.seeds:
        ends = {run.name: outcome(run) for run in plan.needed[cell.name, seed]}
        found = {key: value for end in ends.values() for key, value in (end.scores or {}).items()}
        for score in found.keys() & values.keys():
            values[score].append(found[score])
        errors = [f"{name}: {end.error}" for name, end in ends.items() if end.error]
        if errors:
            failed[f"seed {seed}"] = "; ".join(errors[:1] if ends["pretrain"].error else errors)
        if not ends["pretrain"].error:  # a failed one blocks the rest
            missing += sum(end.scores is None and end.error is None for end in ends.values())
        if all(end.scores is not None and end.seconds is not None for end in ends.values()):
            minutes.append(sum(end.seconds for end in ends.values()) / 60)
    return {
        "cell": cell.name,
        "labels": list(cell.labels),
        "settings": cell.settings,
        "seeds": list(plan.seeds),
        "scores": {score: summarize_values(found) for score, found in values.items()},
        "train_gflop_per_image": mean_train_flops(plan.needed[cell.name, plan.seeds[0]][0].config) / 1e9,
        "minutes": statistics.fmean(minutes) if minutes else None,
        "failed": failed,
        "missing": missing,
    }


def mean_train_flops(config: ConfigDict) -> float:
    """FLOPs of a training image, forward and backward, averaged over the run's resolutions."""
    model, begin, total = MAEConfig(**config.model), 0.0, 0.0
    for end, size in (*config.train.resolutions, (1.0, model.image_size)):
        total += (end - begin) * train_flops(dataclasses.replace(model, image_size=size))
        begin = end
    return total


def summarize_values(values: list[float]) -> dict[str, Any]:
    """{"mean", "std" (of the sample), "values"}; None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return {"mean": mean, "std": statistics.stdev(values) if len(values) > 1 else None, "values": values}


def is_share(score: str) -> bool:
    """Whether a score is a share of the images, shown in per cent."""
    return "top" in score.rsplit("/", 1)[-1]


def show(score: str, summary: dict[str, Any]) -> str:
    """ "97.5 ± 0.3" for per cent, "0.3032 ± 0.0011" for other scores."""
    scale, digits = (100, 1) if is_share(score) else (1, 4)
    parts = [f"{scale * part:.{digits}f}" for part in (summary["mean"], summary["std"]) if part is not None]
    return " ± ".join(parts) or "–"


def draw_markdown(rows: list[dict[str, Any]], axes: list[Axis], scores: tuple[str, ...]) -> str:
    """The rows as a Markdown table, followed by a list of failures."""
    header = [axis.title for axis in axes] + ["GFLOP an image"]
    table = [header + [f"{score} %" if is_share(score) else score for score in scores] + ["minutes"]]
    for row in rows:
        marks = ["failed"] * bool(row["failed"]) + ["missing"] * bool(row["missing"])
        labels = list(row["labels"])
        labels[-1] += f" ({', '.join(marks)})" if marks else ""
        minutes = "–" if row["minutes"] is None else f"{row['minutes']:.1f}"
        flop = f"{row['train_gflop_per_image']:.3g}"
        table.append([*labels, flop, *(show(score, row["scores"][score]) for score in scores), minutes])
    table = [[text.replace("|", "\\|") for text in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = len(axes)
    lines = []
    for line in table:
        cells = [t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True))]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    notes = [f"- {row['cell']}, {seed}: {why}" for row in rows for seed, why in row["failed"].items()]
    if notes:
        lines += ["", "Failed:", "", *(note.replace("\n", " ") for note in notes)]
    return "\n".join(lines) + "\n"


def draw_csv(rows: list[dict[str, Any]], axes: list[Axis], scores: tuple[str, ...]) -> str:
    """The rows as CSV in full precision; each score has mean, std and n, its number of seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [f"{score} {part}" for score in scores for part in ("mean", "std", "n")]
    writer.writerow(["cell", *(axis.title for axis in axes), "train_gflop_per_image", "minutes", *columns, "failed"])
    for row in rows:
        found = [row["scores"][score] for score in scores]
        numbers = [number for score in found for number in (score["mean"], score["std"], len(score["values"]))]
        failed = "; ".join(f"{seed}: {why}" for seed, why in row["failed"].items())
        writer.writerow([row["cell"], *row["labels"], row["train_gflop_per_image"], row["minutes"], *numbers, failed])
    return text.getvalue()
