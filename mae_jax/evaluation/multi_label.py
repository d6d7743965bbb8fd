"""Scores of a classifier whose classes apply independently of each other, a table and a diagram of the classes."""

from typing import NamedTuple

import numpy as np

from mae_jax.evaluation.drawing import draw
from mae_jax.evaluation.scores import Report, average_precisions, mean_of, or_none
from mae_jax.runtime.errors import escaped

NAMED = 40  # classes at most whose names are drawn
COLUMNS = {
    "class": ("class", "<24", ".23"), "images": ("images", ">6", ","), "average_precision": ("AP", ">7", ".1%"),
    "precision": ("precision", ">9", ".1%"), "recall": ("recall", ">7", ".1%"), "f1": ("F1", ">7", ".1%"),
}  # fmt: skip


class MultiLabelPredictions(NamedTuple):
    label: np.ndarray  # [N, K] 1 for a class that applies, else 0
    logits: np.ndarray  # [N, K] float32

    def scores(self) -> dict[str, float]:
        """{"loss", "mAP", "micro_f1", "macro_f1"}; only the loss, of the sigmoids, if it is not finite.

        mAP is the mean over the classes that apply to any example. A class is predicted where its probability is above
        0.5. The macro F1 is the mean over all classes, 0 for one that is neither there nor predicted.
        """
        x = self.logits.astype(np.float64)
        loss = float(np.mean(np.maximum(x, 0) - x * self.label + np.log1p(np.exp(-np.abs(x)))))
        if not np.isfinite(loss):
            return {"loss": loss}
        tp, fp, fn, _ = self.counts()
        return {
            "loss": loss,
            "mAP": mean_of(average_precisions(self.label, self.logits)),
            "micro_f1": float(2 * tp.sum() / max(2 * tp.sum() + fp.sum() + fn.sum(), 1)),
            "macro_f1": float(np.mean(2 * tp / np.maximum(2 * tp + fp + fn, 1))),
        }

    def counts(self) -> tuple[np.ndarray, ...]:
        """Of each class the numbers int64 [K] of true and false positives, false and true negatives."""
        applies, predicted = self.label > 0, self.logits > 0
        pairs = ((applies, predicted), (~applies, predicted), (applies, ~predicted), (~applies, ~predicted))
        return tuple(np.count_nonzero(one & other, axis=0) for one, other in pairs)

    def table(self, class_names: list[str]) -> list[dict]:
        """A row for each class: "class", "images" to which it applies, scores (None where 0 / 0), and `counts`."""
        tp, fp, fn, tn = self.counts()
        with np.errstate(invalid="ignore"):
            scores = [average_precisions(self.label, self.logits), tp / (tp + fp), tp / (tp + fn)]
            scores.append(2 * tp / (2 * tp + fp + fn))
        names = ("class", "images", *list(COLUMNS)[2:], "tp", "fp", "fn", "tn")
        counts = (count.tolist() for count in (tp, fp, fn, tn))
        columns = (class_names, (tp + fn).tolist(), *map(or_none, scores), *counts)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def report(self, class_names: list[str], title: list[str]) -> Report:
        rows = self.table(class_names)
        picture = draw_average_precisions(rows, len(self.label), title)
        details = {"average_precision": {row["class"]: row["average_precision"] for row in rows}}
        order, drawn = "average_precision", "average_precision.png"
        return Report("classes.csv", rows, COLUMNS, order, drawn, picture, details)


def draw_average_precisions(rows: list[dict], count: int, title: list[str]) -> np.ndarray:
    """A bar for each class's average precision, the lowest below; a dot for that of guessing: its share of images."""
    rows = sorted(rows, key=lambda row: row["average_precision"] or 0)
    values, shares = [row["average_precision"] or 0 for row in rows], [row["images"] / count for row in rows]

    def paint(figure):
        axes, places = figure.add_subplot(), range(len(rows))
        axes.barh(places, values, color="tab:blue", label="average precision")
        axes.plot(shares, places, "o", color="black", markersize=3, label="of guessing: share of images")
        axes.set(xlim=(0, 1), xlabel="average precision", ylim=(-0.5, len(rows) - 0.5))
        if len(rows) <= NAMED:
            axes.set_yticks(places, [escaped(row["class"]) for row in rows], parse_math=False)
        else:
            axes.set_ylabel(f"{len(rows):,} classes")
        axes.set_title("\n".join(map(escaped, title)), fontsize=10, parse_math=False)  # $ in a name is no formula
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)

    return draw(8, 2 + 0.25 * min(len(rows), NAMED), paint)
