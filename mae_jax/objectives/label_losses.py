"""What a classifier learns from labels of each kind: targets, their loss, weights of classes, units of numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.augment import soft_targets
from mae_jax.data.sources import Source
from mae_jax.models.classifier import ClassifierConfig
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import from_main

OUTPUTS = {"class": "classes", "multi": "classes, of which any apply", "number": "numbers"}  # of the kinds, in words


def fit_to_kind(config: ConfigDict, train: Source) -> list[str]:
    """Raises UserError for settings `classifier.*` that have no meaning for the training labels' kind.

    Label smoothing that the command line does not ask for has no effect: the configs for fine-tuning have it. Returns
    a line if so.
    """
    classifier, kind, changed = config.classifier, train.label_kind, []
    if kind == "class":
        return []
    if smoothing := classifier.label_smoothing:
        if "classifier.label_smoothing" in config.given:
            raise UserError(
                f"classifier.label_smoothing={smoothing} is for one class a picture, but the labels are of the kind "
                f"{kind}: leave it out"
            )
        changed.append(f"classifier.label_smoothing={smoothing} has no effect: it is for one class a picture")
    if kind == "number" and classifier.class_weights:
        raise UserError(
            f"classifier.class_weights={classifier.class_weights} is for classes, not for numbers: leave it out"
        )
    if classifier.num_classes != train.num_classes:
        raise UserError(
            f"classifier.num_classes={classifier.num_classes}, but the labels of the kind {kind} have "
            f"{train.num_classes} values: leave it out"
        )
    return changed


def units_of(train: Source) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each number over the training pictures; the same in all processes.

    Returns {"number_mean", "number_std"}. UserError for a picture without a number, and numbers that are all the same.
    """
    labels = _all_labels(train).astype(np.float64)
    for name, values in zip(train.class_names, labels.T, strict=True):
        if values.min() == values.max():
            raise UserError(
                f"{name} is {values[0]:g} for all of the {len(values):,} training images: there is nothing to learn; "
                "set data.label_column to other numbers"
            )
    # Hosts may round differently.
    return from_main({f"number_{name}": tuple(getattr(labels, name)(axis=0).tolist()) for name in ("mean", "std")})


def balanced_weights(train: Source, num_classes: int) -> np.ndarray:
    """Weights float32 [K] with which rare classes count as much as frequent ones, from the n training labels.

    Class: n / (C n_k) for the C classes that have examples, as in scikit-learn's `compute_class_weight`; 0 for those
    without any. Multi: of the pictures to which a class applies, n_negative / n_positive; 1 where either has none.
    """
    labels = _all_labels(train)
    if train.label_kind == "class":
        counts = np.bincount(labels, minlength=num_classes)
        return np.where(counts, len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0).astype(np.float32)
    positive = np.count_nonzero(labels, axis=0)
    negative = len(labels) - positive
    return np.where(positive * negative, negative / np.maximum(positive, 1), 1).astype(np.float32)


def _all_labels(train: Source) -> np.ndarray:
    """`Source.labels`; UserError if a picture has none."""
    labels = train.labels()
    missing = labels < 0 if train.label_kind == "class" else np.isnan(labels).any(axis=1)
    if missing.any():
        name = train.name_of(int(np.argmax(missing)))
        raise UserError(f"{name} has no label: choose a split whose pictures are all labelled")
    return labels


def make_targets(labels: jax.Array, model: ClassifierConfig, smoothing: float) -> jax.Array:
    """Labels as float32 [b, k]: of a class its one-hot vector, smoothed; of the other kinds the labels themselves."""
    return soft_targets(labels, model.num_classes, smoothing) if model.label_kind == "class" else labels


def label_loss(outputs: jax.Array, targets: jax.Array, model: ClassifierConfig, weights: Any = None) -> jax.Array:
    """The mean loss of outputs [b, k] for targets [b, k], which may be mixed ones; linear in the targets' examples.

    Class: cross-entropy of the softmax. Multi: binary cross-entropy of the sigmoids, mean over the classes. Number:
    squared error in units of the training labels' standard deviation, mean over the numbers. `weights`: see
    `balanced_weights`; they are not divided by their sum, so the mean over parts of a batch is that of the batch.
    """
    if model.label_kind == "number":
        return jnp.mean(((outputs - targets) / jnp.asarray(model.number_std or 1.0, jnp.float32)) ** 2)
    if model.label_kind == "multi":
        positives = targets if weights is None else targets * weights
        return -jnp.mean(positives * jax.nn.log_sigmoid(outputs) + (1 - targets) * jax.nn.log_sigmoid(-outputs))
    targets = targets if weights is None else targets * weights
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(outputs), axis=-1))
