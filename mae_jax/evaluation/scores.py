"""Scores of predictions for labels of each kind (`Source.label_kind`), by scikit-learn, and how they are told."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

MAIN = {"class": "top1", "multi": "mAP", "number": "r2"}  # what is printed, and the best chosen by
TOLD = {  # name -> how people call it, and its format
    "top1": ("top-1", ".2%"),
    "balanced_accuracy": ("balanced", ".2%"),
    "top5": ("top-5", ".2%"),
    "mAP": ("mAP", ".2%"),
    "micro_f1": ("micro F1", ".2%"),
    "macro_f1": ("macro F1", ".2%"),
    "r2": ("R2", ".4f"),
    "mae": ("mean absolute error", ".4g"),
    "mse": ("mean squared error", ".4g"),
    "loss": ("loss", ".4f"),
}


def tell(scores: Mapping[str, float]) -> str:
    """Those of the scores that have a name in `TOLD`: "top-1 93.33%, loss 0.2311", for example."""
    told = ((*TOLD[name], scores[name]) for name in TOLD if name in scores)
    return ", ".join(f"{title} {value:{form}}" for title, form, value in told)


def feature_scores(kind: str, labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """{"mAP"} of scores [N, K] for labels of the kind multi, {"r2", "mae"} of predicted numbers [N, K]: means."""
    if kind == "multi":
        return {"mAP": mean_of(average_precisions(labels, predicted))}
    errors = number_errors(labels, predicted)
    return {name: mean_of(errors[name]) for name in ("r2", "mae")}


def with_labels(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of features [N, D] and labels (`Source.labels`) that have a label."""
    known = labels >= 0 if labels.ndim == 1 else ~np.isnan(labels).any(axis=1)
    return (features, labels) if known.all() else (features[known], labels[known])


def average_precisions(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Average precision [K] of the scores [N, K] for labels 0 and 1; NaN for a class that applies to no example."""
    from sklearn.metrics import average_precision_score  # slow to import: a second

    found = np.full(labels.shape[1], np.nan)
    for number in np.flatnonzero(labels.any(axis=0)):
        found[number] = average_precision_score(labels[:, number] > 0, scores[:, number])
    return found


def number_errors(labels: np.ndarray, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """{"mse", "mae", "r2"} of each of the numbers [N, K], in float64 [K]; an R2 of fewer than 2 examples is NaN."""
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    arrays = labels.astype(np.float64), predicted.astype(np.float64)
    found = {
        "mse": mean_squared_error(*arrays, multioutput="raw_values"),
        "mae": mean_absolute_error(*arrays, multioutput="raw_values"),
    }
    several = len(labels) > 1
    return found | {"r2": r2_score(*arrays, multioutput="raw_values") if several else np.full(labels.shape[1], np.nan)}


def mean_of(values: np.ndarray) -> float:
    """The mean of those that are not NaN; NaN if all are."""
    real = values[~np.isnan(values)]
    return float(real.mean()) if len(real) else float("nan")


def or_none(values: np.ndarray) -> list[float | None]:
    """The values for tables and JSON, with None for NaN."""
    return [None if np.isnan(value) else float(value) for value in values]


class Report(NamedTuple):
    """What a table, a picture and result.json tell of predictions."""

    file: str  # name of the table's file
    rows: list[dict[str, Any]]  # of the table; None: no value
    columns: dict[str, tuple[str, str, str]]  # those to print: key -> heading, place, format
    order: str  # the column whose lowest values are printed first
    drawn: str  # name of the picture
    picture: np.ndarray  # uint8 [h, w, 3]
    details: dict[str, Any]  # for result.json
