"""The curves of a run in one picture: loss, learning rate and what was learnt, from the lines of metrics.jsonl."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

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
NAMES = tuple(name for curves in PANELS.values() for name in curves)
EARLY = 0.1  # share of the steps in which the loss falls from so high that the rest would be flat


class Panel(NamedTuple):
    """Curves that share their axes."""

    title: str
    curves: dict[str, tuple[list[int], list[float]]]  # name in the legend -> steps, values


class Curves:
    """What of a run's metrics is drawn.

    Args:
      lines: of metrics.jsonl.
    """

    def __init__(self, lines: Iterable[dict[str, Any]] = ()):
        self._points: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in NAMES}
        for line in lines:
            self.add(line)

    def add(self, line: dict[str, Any]) -> None:
        """Takes a further line; what is not drawn in it is left out."""
        for name in NAMES:
            if isinstance(line.get(name), float) and math.isfinite(line[name]):
                steps, values = self._points[name]
                steps.append(line["step"])
                values.append(line[name])

    def panels(self) -> list[Panel]:
        """The panels of which there is something, each with the curves of which there is something."""
        panels = []
        for title, names in PANELS.items():
            scale = 100 if "%" in title else 1
            found = {label: self._points[name] for name, label in names.items() if self._points[name][0]}
            curves = {label: (steps, [scale * value for value in values]) for label, (steps, values) in found.items()}
            panels += [Panel(title, curves)] if curves else []
        return panels


def draw(panels: list[Panel]) -> np.ndarray:
    """A picture uint8 [400, 1200, 3]: the panels in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since matplotlib takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, panel in zip(row, panels, strict=True):
        for label, (steps, values) in panel.curves.items():
            axes.plot(steps, values, label=label, linewidth=1.2, marker="o" if len(steps) <= 30 else None, markersize=3)
        axes.set(title=panel.title, xlabel="step")
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.3)
        if panel.title == "loss":
            axes.set_ylim(*_loss_limits(panel))
        if list(panel.curves) != [panel.title]:
            axes.legend()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _loss_limits(panel: Panel) -> tuple[float, float]:
    """Where the axis of the loss begins and ends: a curve may come from above in the run's first steps."""
    points = [point for steps, values in panel.curves.values() for point in zip(steps, values, strict=True)]
    begin = EARLY * max(step for step, _ in points)
    values = [value for step, value in points if step >= begin]
    margin = 0.05 * (max(values) - min(values)) or 0.05 * abs(max(values)) or 0.05
    return min(values) - margin, max(values) + margin
