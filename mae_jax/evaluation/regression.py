"""Scores of predicted numbers, a table of them, and a diagram beside the right ones."""

from typing import NamedTuple

import numpy as np

from mae_jax.evaluation.drawing import draw
from mae_jax.evaluation.scores import Report, mean_of, number_errors, or_none
from mae_jax.runtime.errors import escaped

DRAWN = 6  # numbers at most
COLUMNS = {
    "number": ("number", "<24", ".23"), "images": ("images", ">6", ","), "mae": ("mean absolute error", ">19", ".4g"),
    "mse": ("mean squared error", ">18", ".4g"), "r2": ("R2", ">8", ".4f"),
}  # fmt: skip


class NumberPredictions(NamedTuple):
    label: np.ndarray  # [N, K] the right numbers
    predicted: np.ndarray  # [N, K] float32, in the same units
    std: np.ndarray | float = 1.0  # [K] of the training labels: the loss's units

    def scores(self) -> dict[str, float]:
        """{"loss", "mse", "mae", "r2"}: means over the numbers; only the loss if it is not finite."""
        errors = (self.predicted.astype(np.float64) - self.label) / self.std
        loss = float(np.mean(errors**2))
        if not np.isfinite(loss):
            return {"loss": loss}
        return {"loss": loss} | {name: mean_of(x) for name, x in number_errors(self.label, self.predicted).items()}

    def table(self, names: list[str]) -> list[dict]:
        """A row for each number: "number" (its name), "images", "mae", "mse", "r2" (None where it has no value)."""
        errors = {name: or_none(values) for name, values in number_errors(self.label, self.predicted).items()}
        return [
            {"number": name, "images": len(self.label)} | {key: errors[key][place] for key in ("mae", "mse", "r2")}
            for place, name in enumerate(names)
        ]

    def report(self, names: list[str], title: list[str]) -> Report:
        rows, picture = self.table(names), draw_scatter(self, names, title)
        details = {"numbers": {row["number"]: {key: row[key] for key in ("mae", "mse", "r2")} for row in rows}}
        return Report("numbers.csv", rows, COLUMNS, "r2", "scatter.png", picture, details)


def draw_scatter(found: NumberPredictions, names: list[str], title: list[str]) -> np.ndarray:
    """A dot for each image, predicted number over right one, in a panel for each of the first numbers."""
    count = min(len(names), DRAWN)
    columns = min(count, 3)
    rows = -(-count // columns)

    def paint(figure):
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for place, axes in enumerate(panels):
            if place >= count:
                axes.set_axis_off()
                continue
            right, predicted = found.label[:, place], found.predicted[:, place]
            axes.plot(right, predicted, ".", markersize=3, alpha=0.5)
            ends = [right.min(), right.max()]
            axes.plot(ends, ends, color="black", linewidth=0.8)
            axes.set(xlabel="right", ylabel="predicted")
            axes.set_title(escaped(names[place]), fontsize=10, parse_math=False)  # $ in a name is no formula
        figure.suptitle("\n".join(map(escaped, title)), fontsize=10, parse_math=False)

    return draw(4.5 * columns + 0.5, 4.5 * rows + 0.5, paint)
