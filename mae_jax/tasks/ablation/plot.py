"""The picture of an ablation: its scores, beside the paper's curves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mae_jax.tasks.ablation.jobs import Plan
from mae_jax.tasks.ablation.table import is_share

PAPER_LABEL = "top-1 % (ViT-L, ImageNet)"
OURS, PAPERS = "tab:blue", "tab:gray"
LEAST_GAP = 0.05  # between two numbers under the x axis, as a share of its length


class Panel(NamedTuple):
    """One curve, or one point for each named row."""

    title: str
    label: str  # of the scores
    xs: list[float] | list[str]
    ys: list[float]
    errors: list[float] | None
    color: str


def make_panels(plan: Plan, rows: list[dict[str, Any]], scores: tuple[str, ...]) -> list[Panel]:
    """A panel for each score that there is something of; cells without it are absent."""
    numbers = all(cell.x is not None for cell in plan.cells)
    panels = []
    for score in scores:
        scale = 100 if is_share(score) else 1
        found = [
            (cell.x if numbers else cell.name, row["scores"][score])
            for cell, row in zip(plan.cells, rows, strict=True)
            if row["scores"][score]["mean"] is not None
        ]
        if not found:
            continue
        xs, summaries = zip(*(sorted(found, key=lambda pair: pair[0]) if numbers else found), strict=True)
        ys = [scale * summary["mean"] for summary in summaries]
        errors = [scale * (summary["std"] or 0.0) for summary in summaries] if len(plan.seeds) > 1 else None
        measured = next((run for run in plan.runs if run.after and run.name == score.split("/")[0]), plan.runs[0])
        data = measured.config.data.name or plan.runs[0].config.data.name
        name = score.rsplit("/", 1)[-1].replace("top", "top-")
        panels.append(Panel(f"{score}, {data}", f"{name} %" if scale == 100 else name, list(xs), ys, errors, OURS))
    return panels


def make_paper_panels(paper: tuple) -> list[Panel]:
    """A panel for each curve (name, ((x, y), ...)) of the paper."""
    panels = []
    for name, points in paper:
        xs, ys = zip(*points, strict=True)
        panels.append(Panel(name, PAPER_LABEL, list(xs), list(ys), None, PAPERS))
    return panels


def draw(ours: list[Panel], papers: list[Panel], x_label: str, title: str, source: str) -> np.ndarray:
    """A picture uint8 [height, width, 3]: our panels at the left, the paper's, if there are any, at the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since matplotlib takes a second
    from matplotlib.figure import Figure

    columns = [column for column in (ours, papers) if column]
    lines = max(map(len, columns), default=1)
    heights = [max((_height(column[i]) for column in columns if i < len(column)), default=1.0) for i in range(lines)]
    figure = Figure(figsize=(5.6 * max(1, len(columns)), sum(heights) + 0.6), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(lines, max(1, len(columns)), squeeze=False, height_ratios=heights)
    for j, column in enumerate(columns):
        for i, axes in enumerate(grid[:, j]):
            if i < len(column):
                _draw_panel(axes, column[i], x_label)
            else:
                axes.set_axis_off()
    heading = title
    if papers and source:
        heading += f"\nright: {source}" if title else f"right: {source}"
    figure.suptitle(heading, fontsize=11)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def choose_scale(xs: list[float]) -> str:
    """The scale on which numbers lie more evenly: linear | log."""
    if min(xs) <= 0 or len(set(xs)) < 3:
        return "linear"
    gaps, ratios = np.diff(sorted(set(xs))), np.diff(np.log(sorted(set(xs))))
    return "log" if max(ratios) / min(ratios) < max(gaps) / min(gaps) else "linear"


def thin_out(xs: list[float], place: Callable) -> list[float]:
    """Those of sorted numbers that can be written under an axis without touching one another."""
    places = place(xs)
    kept = [0]
    for i in range(1, len(xs)):
        if places[i] - places[kept[-1]] >= LEAST_GAP * (places[-1] - places[0]):
            kept.append(i)
    return [xs[i] for i in kept]


def _height(panel: Panel) -> float:
    return 2.8 if _is_curve(panel) else 0.9 + 0.3 * len(panel.xs)


def _is_curve(panel: Panel) -> bool:
    return all(isinstance(x, int | float) for x in panel.xs)


def _draw_panel(axes, panel: Panel, x_label: str) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    style = dict(color=panel.color, marker="o", markersize=5, capsize=3)
    if _is_curve(panel):
        axes.errorbar(panel.xs, panel.ys, panel.errors, **style)
        scale = choose_scale(panel.xs)
        axes.set_xscale(scale)
        axes.minorticks_off()
        ticks = thin_out(panel.xs, np.log if scale == "log" else np.asarray)
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
        axes.set(xlabel=x_label, ylabel=panel.label)
    else:
        places = range(len(panel.xs))
        axes.errorbar(panel.ys, places, xerr=panel.errors, linestyle="none", **style)
        axes.set_yticks(places, panel.xs, fontsize=8)
        axes.set_ylim(len(panel.xs) - 0.5, -0.5)
        axes.set_xlabel(panel.label)
        axes.margins(x=0.1)
