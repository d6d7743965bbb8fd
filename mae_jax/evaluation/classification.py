"""A classifier's scores, exact over a data set; of one class a picture: a table by class, the confusion matrix."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mae_jax.evaluation.drawing import draw
from mae_jax.evaluation.evaluator import EvaluationData, Evaluator, State, extract_features, one_ahead
from mae_jax.evaluation.multi_label import MultiLabelPredictions
from mae_jax.evaluation.regression import NumberPredictions
from mae_jax.evaluation.scores import Report
from mae_jax.runtime.errors import escaped
from mae_jax.runtime.mesh import whole
from mae_jax.runtime.sharding import on_rows

COLUMNS = {
    "class": ("class", "<24", ".23"), "images": ("images", ">6", ","), "recall": ("recall", ">7", ".1%"),
    "precision": ("precision", ">9", ".1%"), "often_taken_for": ("often taken for", "<", ""),
}  # fmt: skip


class Predictions(NamedTuple):
    label: np.ndarray  # [N] the right class
    predicted: np.ndarray  # [N] the class with the largest logit
    rank: np.ndarray  # [N] number of classes with a larger logit than the right one; 0 is a hit
    loss: np.ndarray  # [N] float32: cross-entropy

    def scores(self) -> dict[str, float]:
        return summarize_predictions(self)

    def report(self, class_names: list[str], title: list[str]) -> Report:
        confusions = confusion_matrix(self, len(class_names))
        rows, picture = class_table(confusions, class_names), draw_confusion_matrix(confusions, class_names, title)
        recall = {row["class"]: row["recall"] for row in rows}
        details = {"correct": int(np.count_nonzero(self.rank < 1)), "recall": recall}
        return Report("classes.csv", rows, COLUMNS, "recall", "confusion_matrix.png", picture, details)


class Accuracy(Evaluator):
    """Scores of a classifier, by the kind of its labels; `predictions` keeps those of the last run."""

    predictions: Predictions | MultiLabelPredictions | NumberPredictions

    def __init__(self, config: ConfigDict, data: EvaluationData):
        super().__init__(config, data)
        self.outputs_of = on_rows(self._outputs, data.mesh)  # (variables, batch) -> outputs [B, K]

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        data, variables = self.data, state.variables()
        batches = data.kept_batches() if data.kept_batches else data.batches(data.evaluation)
        outputs_of, kind = functools.partial(self.outputs_of, variables), data.evaluation.label_kind
        if kind == "class":
            self.predictions = predict(outputs_of, batches)
        else:
            outputs, labels = extract_features(outputs_of, batches, len(data.evaluation))
            self.predictions = predictions_of(kind, outputs, labels, data.bind(variables).config.number_std)
        yield from self.predictions.scores().items()

    def _outputs(self, variables: dict, batch: dict) -> jax.Array:
        model = self.data.bind(variables)
        x = batch["feature"] if "feature" in batch else model.represent(self.data.normalize(batch["image"]))
        return model.classify(x)[0]


def predictions_of(
    kind: str, outputs: np.ndarray, labels: np.ndarray, std: Sequence[float]
) -> MultiLabelPredictions | NumberPredictions:
    """Of outputs and labels [N, K] of the kind multi or number."""
    return MultiLabelPredictions(labels, outputs) if kind == "multi" else NumberPredictions(labels, outputs, std or 1.0)


def predict(logits_fn: Callable[[dict], jax.Array], batches: Iterator[dict]) -> Predictions:
    """Applies logits_fn (device batch -> logits [B, K]) to every batch; rows of weight 0 are padding and dropped."""
    judged = one_ahead(whole((batch["weight"], *judge(logits_fn(batch), batch["label"]))) for batch in batches)
    found = [jax.device_get(parts) for parts in judged]
    weight, label, predicted, rank, loss = (np.concatenate(part) for part in zip(*found, strict=True))
    real = weight > 0
    return Predictions(label[real], predicted[real], rank[real], loss[real])


@jax.jit
def judge(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, ...]:
    """The parts [B] of `Predictions` of logits [B, K] for labels [B]."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    return label, jnp.argmax(logits, axis=1), rank_of_label(logits, label), loss


@jax.jit
def rank_of_label(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The number of classes [B] with a larger logit than the right one [B]; ties as in argmax, and NaN never hits."""
    own = jnp.take_along_axis(logits, label[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < label[:, None]
    return jnp.sum(~((logits < own) | ((logits == own) & ~earlier)), axis=1)


def summarize_predictions(found: Predictions) -> dict[str, float]:
    """{"loss", "top1", "top5"}: means over all examples; "balanced_accuracy": of the recalls of the classes there."""
    images = np.bincount(found.label)
    hits = np.bincount(found.label[found.rank < 1], minlength=len(images))
    return {
        "loss": float(np.mean(found.loss, dtype=np.float64)),
        "top1": float(np.mean(found.rank < 1)),
        "top5": float(np.mean(found.rank < 5)),
        "balanced_accuracy": float(np.mean(hits[images > 0] / images[images > 0])),
    }


def confusion_matrix(found: Predictions, num_classes: int) -> np.ndarray:
    """Counts [K, K] int64: row = right class, column = predicted class."""
    flat = found.label.astype(np.int64) * num_classes + found.predicted
    return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_table(confusions: np.ndarray, class_names: list[str]) -> list[dict]:
    """A row for each class: {"class", "images", "recall", "precision", "often_taken_for"}; None where 0 / 0."""
    others = confusions * (1 - np.eye(len(confusions), dtype=np.int64))
    counts = (x.tolist() for x in (np.diag(confusions), confusions.sum(axis=1), confusions.sum(axis=0)))
    return [
        {
            "class": name,
            "images": images,
            "recall": right / images if images else None,
            "precision": right / predicted if predicted else None,
            "often_taken_for": class_names[np.argmax(wrong)] if wrong.any() else None,
        }
        for name, right, images, predicted, wrong in zip(class_names, *counts, others, strict=True)
    ]


def draw_confusion_matrix(confusions: np.ndarray, class_names: list[str], title: list[str]) -> np.ndarray:
    """A picture uint8 [height, width, 3], coloured by shares of a row; up to 20 classes get numbers and names."""
    shares = confusions / np.maximum(confusions.sum(axis=1, keepdims=True), 1)
    small = len(confusions) <= 20
    side = max(5.0, 0.5 * len(confusions)) if small else 8.0

    def paint(figure):
        from matplotlib.colors import PowerNorm

        axes = figure.add_subplot()
        # With many classes, square roots make rare confusions visible.
        scale = PowerNorm(1.0 if small else 0.5, vmin=0, vmax=1)
        picture = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
        figure.colorbar(picture, ax=axes, label="share of the right class's images")
        axes.set(xlabel="predicted class", ylabel="right class")
        axes.set_title("\n".join(map(escaped, title)), fontsize=10, parse_math=False)  # $ in a name is no formula
        if not small:
            return
        ticks, names = range(len(class_names)), [escaped(name) for name in class_names]
        axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(ticks, names, parse_math=False)
        for row, column in zip(*np.nonzero(confusions), strict=True):
            color, text = "white" if shares[row, column] > 0.5 else "black", f"{confusions[row, column]:,}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)

    return draw(side + 1.5, side, paint)
