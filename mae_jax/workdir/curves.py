"""A picture of a run's curves, from the lines of metrics.jsonl."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

# Panels from left to right: title, and name in metrics.jsonl -> name in the legend.
PANELS = {
    "loss": {"train/loss": "training", "eval/loss": "evaluation"},
    "learning rate": {"train/learning_rate": "learning rate"},
    "accuracy on evaluation images, %": {
        "eval/top1": "top-1",
        "eval/top5": "top-5",
        "eval/linear_probe/top1": "linear probe",
        "eval/knn/top1": "k-NN",
    },
}
EARLY = 0.1  # share of the steps whose losses the axis ignores

Curves = dict[str, list[tuple[int, float]]]  # name in the legend -> (step, value)


def make_panels(lines: Iterable[dict[str, Any]]) -> dict[str, Curves]:
    """Title -> curves in one panel, without empty panels and curves."""
    lines, panels = list(lines), {}
    for title, names in PANELS.items():
        scale = 100 if "%" in title else 1
        curves = {
            label: [(line["step"], scale * line[name]) for line in lines if _is_finite(line.get(name))]
            for name, label in names.items()
        }
        panels[title] = {label: points for label, points in curves.items() if points}
    return {title: curves for title, curves in panels.items() if curves}


def _is_finite(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def draw(panels: dict[str, Curves]) -> np.ndarray:
    """A picture uint8 [400, 1200, 3]: the panels in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: matplotlib takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for label, points in curves.items():
            marker = "o" if len(points) <= 30 else None
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker=marker, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.3)
        if title == "loss":
            axes.set_ylim(*_loss_limits(curves))
        if list(curves) != [title]:
            axes.legend()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _loss_limits(curves: Curves) -> tuple[float, float]:
    """The range of the loss axis, without the first steps: their high losses would flatten the rest."""
    points = [point for points in curves.values() for point in points]
    begin = EARLY * max(step for step, _ in points)
    values = [value for step, value in points if step >= begin]
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 0.05
    return min(values) - margin, max(values) + margin
