"""What frozen features are worth: k-NN, a linear probe and their rank, from one extraction."""

from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.sources import Source, count_images
from mae_jax.evaluation.neighbours import knn_predict
from mae_jax.evaluation.probes import logistic_regression_predict
from mae_jax.evaluation.rankme import rankme


def measure_features(
    extract: Callable[[Source], tuple[np.ndarray, np.ndarray]],
    train_source: Source,
    test_source: Source,
    settings: ConfigDict,
    mesh: Mesh,
) -> dict[str, float]:
    """{"knn/top1", "linear_probe/top1"} on the test source, learnt from the training one, and "rankme" of the latter.

    Args:
      extract: a source -> features [N, D] and labels [N].
      settings: `evaluate.*`: knn_k, knn_temperature, linear_probe, probe_c.
      mesh: the devices that the training features are split over.
    """
    (train, train_labels), (test, test_labels) = extract(train_source), extract(test_source)
    num_classes = train_source.num_classes
    neighbours = knn_predict(
        train, train_labels, test,
        num_classes=num_classes, k=settings.knn_k, temperature=settings.knn_temperature, mesh=mesh,
    )  # fmt: skip
    scores = {"knn/top1": float(np.mean(neighbours == test_labels)), "rankme": rankme(train)}
    if settings.linear_probe and len(np.unique(train_labels)) > 1:
        probe = logistic_regression_predict(
            train, train_labels, test, num_classes=num_classes, c=settings.probe_c, mesh=mesh
        )
        scores["linear_probe/top1"] = float(np.mean(probe == test_labels))
    return scores


def describe_features(settings: ConfigDict, train_source: Source | None, eval_source: Source) -> str:
    """What the features are, and of which images, for people; None: of evaluation images alone."""
    token = "the class token" if settings.token == "class" else "mean of the patch tokens"
    return f"features: {token} after the final norm, {count_images(train_source, eval_source)}, centre crops"


def describe_protocol(settings: ConfigDict, train_source: Source, eval_source: Source) -> str:
    """One line that says how `measure_features` measures."""
    probe = f"logistic regression, C {settings.probe_c}" if settings.linear_probe else "left out"
    return (
        f"{describe_features(settings, train_source, eval_source)}; "
        f"k-NN: L2-normalised, cosine, k {settings.knn_k}, temperature {settings.knn_temperature}; "
        f"linear probe: {probe}; RankMe: of the training features"
    )
