"""What an ablation ends with: its scores as a table (Markdown, CSV, JSON), and a plot beside the paper's curves."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import train_flops
from mae_jax.runtime.console import say
from mae_jax.tasks.ablation.grid import Axis, parse_grid
from mae_jax.tasks.ablation.jobs import Outcome, Plan, Run, read_outcome, resolve
from mae_jax.workdir.folder import keep_earlier_measurement
from mae_jax.workdir.writing import finite_or_null, save_picture, write_atomically, write_json


def report(config: ConfigDict, plan: Plan, workdir: Path) -> None:
    """Writes, prints and plots the scores so far."""
    ablate = config.ablate
    rows = make_rows(plan, plan.scores)
    table = draw_markdown(rows, plan.axes, plan.scores)
    write_atomically(workdir / "table.md", table)
    write_atomically(workdir / "table.csv", draw_csv(rows, plan.axes, plan.scores))
    if panels := make_panels(plan, make_rows(plan, ablate.plot), ablate.plot):
        # If the command line changes the axes, the file's title and curves no longer fit.
        axes = parse_grid(resolve([f"--config={config.file}"]).ablate.grid)
        fit = [axis.keys for axis in plan.axes] == [axis.keys for axis in axes]
        names = ("paper", "title", "source")
        paper, title, source = (ablate[name] if fit or f"ablate.{name}" in config.given else "" for name in names)
        x_label = ", ".join(axis.title for axis in plan.axes)
        save_picture(workdir / "plot.png", draw(panels, paper, x_label, title, source))
    say("", *table.split("\n"))
    if failed := sum(len(row["failed"]) for row in rows):
        say(f"{failed} of {len(rows) * len(plan.seeds)} runs failed; the same command tries them again")
    if missing := sum(row["missing"] > 0 for row in rows):
        say(f"{missing} of {len(rows)} cells are incomplete: other shards or the same command will complete them")
    else:
        rows = [{key: value for key, value in row.items() if key not in ("labels", "missing")} for row in rows]
        result = finite_or_null({"rows": rows})
        keep_earlier_measurement(workdir, result)
        write_json(workdir / "result.json", result)
    say(f"see {workdir}/table.md")


def make_rows(
    plan: Plan, scores: tuple[str, ...], outcome: Callable[[Run], Outcome] = read_outcome
) -> list[dict[str, Any]]:
    """A row for each cell. Minutes sum over the cell's runs, shared ones too, and average over seeds."""
    rows = []
    for cell in plan.cells:
        failed, missing, minutes, values = {}, 0, [], {score: [] for score in scores}
        for seed in plan.seeds:
            ends = {run.name: outcome(run) for run in plan.needed[cell.name, seed]}
            found = {key: value for end in ends.values() for key, value in (end.scores or {}).items()}
            for score in found.keys() & values.keys():
                values[score].append(found[score])
            if ends["pretrain"].error:  # it blocks the rest
                ends = {"pretrain": ends["pretrain"]}
            if errors := [f"{name}: {end.error}" for name, end in ends.items() if end.error]:
                failed[f"seed {seed}"] = "; ".join(errors)
            missing += sum(end.scores is None and end.error is None for end in ends.values())
            if all(end.scores is not None and end.seconds is not None for end in ends.values()):
                minutes.append(sum(end.seconds for end in ends.values()) / 60)
        rows.append({
            "cell": cell.name, "labels": list(cell.labels), "settings": cell.settings, "seeds": list(plan.seeds),
            "scores": {score: summarize_values(found) for score, found in values.items()},
            "train_gflop_per_image": mean_train_flops(plan.needed[cell.name, plan.seeds[0]][0].config) / 1e9,
            "minutes": statistics.fmean(minutes) if minutes else None, "failed": failed, "missing": missing,
        })  # fmt: skip
    return rows


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
    columns = [f"{score} %" if is_share(score) else score for score in scores]
    table = [[*(axis.title for axis in axes), "GFLOP an image", *columns, "minutes"]]
    for row in rows:
        marks = ", ".join(mark for mark in ("failed", "missing") if row[mark])
        labels = [*row["labels"][:-1], row["labels"][-1] + (f" ({marks})" if marks else "")]
        minutes = "–" if row["minutes"] is None else f"{row['minutes']:.1f}"
        found = (show(score, row["scores"][score]) for score in scores)
        table.append([*labels, f"{row['train_gflop_per_image']:.3g}", *found, minutes])
    table = [[text.replace("|", "\\|") for text in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    sides = "<" * len(axes) + ">" * (len(widths) - len(axes))
    table.insert(1, [f"{':' * (side == '>'):->{width}}" for side, width in zip(sides, widths, strict=True)])
    lines = []
    for line in table:
        cells = (f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths, strict=True))
        lines.append(f"| {' | '.join(cells)} |")
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


class Panel(NamedTuple):
    """A curve, or a point for each named row."""

    title: str
    label: str  # of the score axis
    xs: list[float] | list[str]
    ys: list[float]
    errors: list[float] | None


def make_panels(plan: Plan, rows: list[dict[str, Any]], scores: tuple[str, ...]) -> list[Panel]:
    """A panel for each score; rows and scores without values are left out."""
    values = [list(row["settings"].values()) for row in rows]
    numbers = all(len(value) == 1 and type(value[0]) in (int, float) for value in values)
    xs = [value[0] if numbers else row["cell"] for value, row in zip(values, rows, strict=True)]
    panels = []
    for score in scores:
        points = [(x, row["scores"][score]) for x, row in zip(xs, rows, strict=True) if row["scores"][score]["values"]]
        if numbers:
            points.sort(key=lambda point: point[0])
        scale, unit = (100, " %") if is_share(score) else (1, "")
        ys = [scale * summary["mean"] for _, summary in points]
        errors = [scale * (summary["std"] or 0.0) for _, summary in points] if len(plan.seeds) > 1 else None
        measured = next((run for run in plan.runs if run.after and run.name == score.split("/")[0]), plan.runs[0])
        data = measured.config.data.name or plan.runs[0].config.data.name
        label = score.rsplit("/", 1)[-1].replace("top", "top-") + unit
        panels.append(Panel(f"{score}, {data}", label, [x for x, _ in points], ys, errors))
    return [panel for panel in panels if panel.xs]


def draw(ours: list[Panel], paper: tuple, x_label: str, title: str, source: str) -> np.ndarray:
    """A picture uint8 [height, width, 3]: our panels on the left, the paper's curves, if any, on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: a second
    from matplotlib.figure import Figure

    curves = [(name, *map(list, zip(*points, strict=True))) for name, points in paper]
    papers = [Panel(name, "top-1 % (ViT-L, ImageNet)", xs, ys, None) for name, xs, ys in curves]
    columns = [column for column in (ours, papers) if column]
    lines = max(map(len, columns))
    figure = Figure(figsize=(5.6 * len(columns), 3.2 * lines + 0.6), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(lines, len(columns), squeeze=False)
    for panels, places, color in zip(columns, grid.T, ("tab:blue", "tab:gray"), strict=False):
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        for panel, axes in zip(panels, places, strict=False):
            numbers = all(isinstance(x, int | float) for x in panel.xs)
            style = dict(color=color, linestyle="-" if numbers else "none", marker="o", markersize=5, capsize=3)
            axes.errorbar(panel.xs if numbers else range(len(panel.xs)), panel.ys, panel.errors, **style)
            axes.set(xlabel=x_label, ylabel=panel.label)
            axes.set_title(panel.title, fontsize=10)
            axes.grid(alpha=0.3)
            if not numbers:
                axes.set_xticks(range(len(panel.xs)), map(str, panel.xs), fontsize=8, rotation=30, ha="right")
                axes.margins(x=0.1)
            elif max(panel.xs) > 10 * min(panel.xs) > 0:
                axes.set_xscale("log")
                axes.minorticks_off()
                axes.set_xticks(panel.xs, [f"{x:g}" for x in panel.xs])  # by default, ticks are powers of ten
    figure.suptitle("\n".join(filter(None, [title, f"right: {source}" if papers and source else ""])), fontsize=11)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
