"""Scores of several labels and of numbers, against formulas and scikit-learn."""

from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, precision_recall_fscore_support, r2_score

from mae_jax.evaluation.classification import Predictions
from mae_jax.evaluation.features import KNN, find_neighbours, mean_label
from mae_jax.evaluation.linear_probe import LinearProbe, fit_logistic_regression, fit_ridge_regression
from mae_jax.evaluation.multi_label import MultiLabelPredictions, draw_average_precisions
from mae_jax.evaluation.regression import NumberPredictions
from mae_jax.evaluation.scores import average_precisions, tell
from tests.meshes import device_mesh

RNG = np.random.default_rng(0)
ANY = (RNG.random((50, 4)) < [0.1, 0.3, 0.6, 0.0]).astype(np.float32)
LOGITS = (RNG.standard_normal((50, 4)) + ANY).astype(np.float32)
NAMES = ["cat", "dog", "owl", "bee"]


def average_precision_by_loops(labels, scores):
    """The mean over the positives of the precision among all examples that score at least as high."""
    return np.mean([labels[scores >= score].mean(dtype=np.float64) for score in scores[labels > 0]])


def test_average_precision_is_the_mean_precision_at_the_positives_and_classes_without_any_are_left_out():
    expected = [average_precision_by_loops(ANY[:, k], LOGITS[:, k]) for k in range(3)]
    np.testing.assert_allclose(average_precisions(ANY, LOGITS), [*expected, np.nan], rtol=1e-12)
    assert MultiLabelPredictions(ANY, LOGITS).scores()["mAP"] == pytest.approx(np.mean(expected))


def test_counts_precision_recall_and_f1_of_several_labels_are_scikit_learns():
    found = MultiLabelPredictions(ANY, LOGITS)
    rows, predicted = found.table(NAMES), LOGITS > 0
    expected = precision_recall_fscore_support(ANY, predicted, zero_division=0)[:3]
    for name, values in zip(("precision", "recall", "f1"), expected, strict=True):
        assert [row[name] or 0 for row in rows] == pytest.approx(list(values))
    assert rows[3]["recall"] is None and rows[3]["average_precision"] is None
    for kind in ("micro", "macro"):
        f1 = precision_recall_fscore_support(ANY, predicted, average=kind, zero_division=0)[2]
        assert found.scores()[f"{kind}_f1"] == pytest.approx(f1)
    for row, labels, hits in zip(rows, ANY.T, predicted.T, strict=True):
        assert (row["tp"], row["fp"]) == (sum(hits[labels > 0]), sum(hits[labels == 0]))
        assert row["tp"] + row["fn"] == row["images"] == labels.sum() and sum(row[n] for n in ("fp", "tn")) == sum(
            labels == 0
        )


def test_a_loss_that_is_not_finite_is_alone():
    broken = np.where(np.arange(4) == 1, np.nan, LOGITS)
    for found in (MultiLabelPredictions(ANY, broken), NumberPredictions(ANY, broken)):
        scores = found.scores()
        assert scores.keys() == {"loss"} and np.isnan(scores["loss"])


def test_errors_of_numbers_are_those_of_the_formulas():
    right, predicted, std = LOGITS[:, :2] * 10 + 500, LOGITS[:, 2:] * 10 + 500, np.array([10.0, 20.0])
    found, errors = NumberPredictions(right, predicted, std), predicted.astype(np.float64) - right
    r2 = 1 - (errors**2).sum(0) / ((right - right.mean(0, dtype=np.float64)) ** 2).sum(0)
    rows = found.table(["weight", "height"])
    for name, values in (("mse", (errors**2).mean(0)), ("mae", np.abs(errors).mean(0)), ("r2", r2)):
        assert [row[name] for row in rows] == pytest.approx(list(values), rel=1e-6)
        assert found.scores()[name] == pytest.approx(values.mean(), rel=1e-6)
    assert found.scores()["loss"] == pytest.approx(np.mean((errors / std) ** 2))
    assert NumberPredictions(right[:1], predicted[:1]).table(["weight", "height"])[0]["r2"] is None


def test_balanced_accuracy_is_scikit_learns():
    label = np.array([0] * 8 + [2] * 2 + [5])
    predicted = np.array([0] * 7 + [2] + [2, 5] + [5])
    found = Predictions(label, predicted, np.where(label == predicted, 0, 3), np.zeros(11, np.float32))
    assert found.scores()["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(label, predicted))
    assert tell({"balanced_accuracy": 0.5, "top1": 0.25, "other": 1}) == "top-1 25.00%, balanced 50.00%"


@pytest.mark.parametrize("classes", [4, 60])
def test_reports_of_several_labels_and_of_numbers_have_a_picture(classes):
    rows = [{"class": f"$^${k}", "images": k, "average_precision": k / classes or None} for k in range(classes)]
    assert draw_average_precisions(rows, classes, ["runs/$^$"]).dtype == np.uint8
    if classes == 4:
        report = NumberPredictions(ANY, LOGITS).report(["$^$", *NAMES[1:]], ["all"])
        assert report.picture.shape[2] == 3 and set(report.columns) <= set(report.rows[0])


def test_the_neighbours_mean_label_is_that_of_the_definition():
    train, test = RNG.standard_normal((2, 30, 6)).astype(np.float32)
    cosine, ids = find_neighbours(train, test, 30, device_mesh(1))
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train.astype(np.float64), test.astype(np.float64))]
    for k, temperature in ((1, 0.07), (7, 0.2)):
        expected = []
        for similarity in units[1] @ units[0].T:
            nearest = np.argsort(-similarity)[:k]
            expected.append(np.average(LOGITS[nearest], axis=0, weights=np.exp(similarity[nearest] / temperature)))
        found = mean_label(cosine, ids, LOGITS, k=k, temperature=temperature)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # cosines in float32


def test_a_regression_for_each_label_is_scikit_learns_of_two_classes():
    x, test = RNG.standard_normal((50, 5)).astype(np.float32), RNG.standard_normal((20, 5)).astype(np.float32)
    w, b = fit_logistic_regression(x, ANY, num_classes=4, c=0.3, mesh=device_mesh(4))
    for k in range(3):
        reference = LogisticRegression(C=0.3, tol=1e-8, max_iter=1000).fit(x, ANY[:, k])
        np.testing.assert_allclose(test @ w[:, k] + b[k], reference.decision_function(test), atol=1e-3)
    assert not w[:, 3].any() and b[3] == pytest.approx(np.log(0.5 / 50.5))  # it applies to none


def test_ridge_regression_is_the_solution_of_its_normal_equations():
    x, numbers = RNG.standard_normal((50, 5)).astype(np.float32), LOGITS[:, :1]
    w, b = fit_ridge_regression(x, numbers, c=0.5)
    centred = x - x.mean(0, dtype=np.float64)
    expected = np.linalg.solve(centred.T @ centred + 2 * np.eye(5), centred.T @ (numbers - numbers.mean()))
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)
    assert (w.shape, b.shape) == ((5, 1), (1,))


def test_frozen_features_are_scored_by_the_kind_of_labels_and_pictures_without_any_are_left_out():
    x = RNG.standard_normal((50, 5)).astype(np.float32)
    numbers = (x[:, :1] * 3 + 7).astype(np.float32)
    numbers[3] = np.nan
    settings = SimpleNamespace(knn_k=5, knn_temperature=0.07, probe_c=1e4, linear_probe=True)
    source = SimpleNamespace(label_kind="number", num_classes=1)
    data = SimpleNamespace(
        features=lambda *_: (x, numbers), train=source, evaluation=source, mesh=device_mesh(1), labelled=True
    )
    config = SimpleNamespace(evaluate=settings)
    scores = dict(KNN(config, data).run(None)) | dict(LinearProbe(config, data).run(None))
    assert scores.keys() == {"knn/r2", "knn/mae", "linear_probe/r2", "linear_probe/mae"}
    assert scores["linear_probe/r2"] == pytest.approx(1, abs=1e-6) and scores["knn/r2"] > 0.5
    real = np.flatnonzero(~np.isnan(numbers[:, 0]))
    cosine, ids = find_neighbours(x[real], x[real], 5, device_mesh(1))
    expected = r2_score(numbers[real], mean_label(cosine, ids, numbers[real], k=5, temperature=0.07))
    assert scores["knn/r2"] == pytest.approx(expected)
    numbers[:] = np.nan
    assert not [*KNN(config, data).run(None), *LinearProbe(config, data).run(None)]
