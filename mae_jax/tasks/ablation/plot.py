"""Plots an ablation's scores beside the paper's curves."""

from typing import Any, NamedTuple

import numpy as np

from mae_jax.runtime.errors import UserError
from mae_jax.tasks.ablation.jobs import Plan
from mae_jax.tasks.ablation.table import is_share

PAPER_LABEL = "top-1 % (ViT-L, ImageNet)"
OURS, PAPERS = "tab:blue", "tab:gray"


class Panel(NamedTuple):
    """A curve, or a point for each named row."""

    title: str
    label: str  # of the score axis
    xs: list[float] | list[str]
    ys: list[float]
    errors: list[float] | None
    color: str

    @property
    def is_curve(self) -> bool:
        return all(isinstance(x, int | float) for x in self.xs)

    @property
    def height(self) -> float:
        """In inches."""
        return 2.8 if self.is_curve else 0.9 + 0.3 * len(self.xs)


def make_panels(plan: Plan, rows: list[dict[str, Any]], scores: tuple[str, ...]) -> list[Panel]:
    """A panel for each score; rows and scores without values are left out."""
    numbers = all(cell.x is not None for cell in plan.cells)
    panels = []
    for score in scores:
        xs = [cell.x if numbers else cell.name for cell in plan.cells]
        found = [(x, row["scores"][score]) for x, row in zip(xs, rows, strict=True) if row["scores"][score]["values"]]
        if not found:
            continue
        xs, summaries = zip(*(sorted(found, key=lambda pair: pair[0]) if numbers else found), strict=True)
        scale = 100 if is_share(score) else 1
        ys = [scale * summary["mean"] for summary in summaries]
        errors = [scale * (summary["std"] or 0.0) for summary in summaries] if len(plan.seeds) > 1 else None
        measured = next((run for run in plan.runs if run.after and run.name == score.split("/")[0]), plan.runs[0])
        data = measured.config.data.name or plan.runs[0].config.data.name
        label = score.rsplit("/", 1)[-1].replace("top", "top-") + (" %" if is_share(score) else "")
        panels.append(Panel(f"{score}, {data}", label, list(xs), ys, errors, OURS))
    return panels


def make_paper_panels(paper: tuple) -> list[Panel]:
    """A panel for each curve (name, ((x, y), ...)) of the paper; UserError if malformed."""
    panels = []
    for curve in paper:
        try:
            name, points = curve
            xs, ys = zip(*points, strict=True)
        except (TypeError, ValueError):
            name, xs, ys = "", (), (None,)
        if not all(isinstance(y, int | float) for y in ys):
            raise UserError(
                f"ablate.paper has {curve!r}, which is no curve (name, ((x, y), ...)), for example "
                '("fine-tuning", ((0.5, 84.9), (0.75, 84.9)))'
            )
        panels.append(Panel(name, PAPER_LABEL, list(xs), list(ys), None, PAPERS))
    return panels


def draw(ours: list[Panel], papers: list[Panel], x_label: str, title: str, source: str) -> np.ndarray:
    """A picture uint8 [height, width, 3]: our panels on the left, the paper's, if any, on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import: a second
    from matplotlib.figure import Figure

    columns = [column for column in (ours, papers) if column]
    lines = max(map(len, columns))
    heights = [max(column[i].height for column in columns if i < len(column)) for i in range(lines)]
    figure = Figure(figsize=(5.6 * len(columns), sum(heights) + 0.6), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(lines, len(columns), squeeze=False, height_ratios=heights)
    for column, places in zip(columns, grid.T, strict=True):
        for panel, axes in zip(column, places, strict=False):
            _draw_panel(axes, panel, x_label)
        for axes in places[len(column) :]:
            axes.set_axis_off()
    heading = [title, f"right: {source}" if papers and source else ""]
    figure.suptitle("\n".join(filter(None, heading)), fontsize=11)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def choose_scale(xs: list[float]) -> str:
    """The scale, linear or log, on which numbers lie more evenly."""
    if min(xs) <= 0 or len(set(xs)) < 3:
        return "linear"
    gaps, ratios = np.diff(sorted(set(xs))), np.diff(np.log(sorted(set(xs))))
    return "log" if max(ratios) / min(ratios) < max(gaps) / min(gaps) else "linear"


def _draw_panel(axes, panel: Panel, x_label: str) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.3)
    style = dict(color=panel.color, marker="o", markersize=5, capsize=3)
    if panel.is_curve:
        axes.errorbar(panel.xs, panel.ys, panel.errors, **style)
        axes.set(xlabel=x_label, ylabel=panel.label, xscale=choose_scale(panel.xs))
        if axes.get_xscale() == "log":  # by default, ticks are powers of ten
            axes.minorticks_off()
            axes.set_xticks(panel.xs, [f"{x:g}" for x in panel.xs])
    else:
        axes.errorbar(panel.ys, range(len(panel.xs)), xerr=panel.errors, linestyle="none", **style)
        axes.set_yticks(range(len(panel.xs)), panel.xs, fontsize=8)
        axes.set_ylim(len(panel.xs) - 0.5, -0.5)
        axes.set_xlabel(panel.label)
        axes.margins(x=0.1)
