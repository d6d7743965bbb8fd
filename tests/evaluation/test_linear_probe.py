import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from mae_jax.evaluation import linear_probe
from mae_jax.evaluation.linear_probe import fit_logistic_regression
from tests.meshes import device_mesh

ONE, FOUR = device_mesh(1), device_mesh(4)


def class_scores(features, w, b):
    return features @ w + b


def predict(x, labels, test, *, num_classes, c=1.0):
    return class_scores(test, *fit_logistic_regression(x, labels, num_classes=num_classes, c=c, mesh=ONE)).argmax(1)


def digits():
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    return pixels[:500], labels[:500], pixels[1437:]


def clusters(spread=0.0):
    """Four overlapping Gaussian classes; with a spread, features of scales e^-spread .. e^spread, off the origin."""
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=900)
    features = 0.5 * rng.normal(size=(4, 12))[labels] + rng.normal(size=(900, 12))
    features = features * np.exp(spread * np.linspace(-1, 1, 12)) + spread * rng.normal(size=12)
    return features[:600].astype(np.float32), labels[:600], features[600:].astype(np.float32)


def objective(x, labels, w, b, c):
    logits = x.astype(np.float64) @ w + b
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), labels]
    return losses.sum() + (w.astype(np.float64) ** 2).sum() / (2 * c)


@pytest.mark.parametrize("data", [digits(), clusters(), clusters(spread=2.0)], ids=["digits", "clusters", "uneven"])
@pytest.mark.parametrize("c", [0.01, 1.0])
def test_the_minimum_is_scikit_learns(data, c):
    x, labels, test = data
    reference = LogisticRegression(C=c, max_iter=10_000, tol=1e-7).fit(x.astype(np.float64), labels)
    expected = objective(x, labels, reference.coef_.T, reference.intercept_, c)
    w, b = fit_logistic_regression(x, labels, num_classes=labels.max() + 1, c=c, mesh=ONE)
    assert objective(x, labels, w, b, c) == pytest.approx(expected, rel=1e-5)
    assert np.mean(class_scores(test, w, b).argmax(axis=1) == reference.predict(test)) >= 0.99


def test_devices_blocks_and_the_padding_of_both_change_only_the_rounding(monkeypatch):
    x, labels, test = clusters()
    x, labels = x[:595], labels[:595]  # neither 4 devices nor blocks of 50 rows divide it
    expected = class_scores(test, *fit_logistic_regression(x, labels, num_classes=4, c=0.1, mesh=ONE))
    monkeypatch.setattr(linear_probe, "ROW_BLOCK", 50)
    for mesh in (ONE, FOUR):
        found = class_scores(test, *fit_logistic_regression(x, labels, num_classes=4, c=0.1, mesh=mesh))
        # Two paths of L-BFGS that both end where the gradient is below 1e-6.
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_classes_without_examples_are_never_predicted_and_change_nothing():
    x, labels, test = clusters()
    expected = predict(x, labels, test, num_classes=4)
    spread_out = np.array([0, 2, 3, 5])
    found = predict(x, spread_out[labels], test, num_classes=7)
    np.testing.assert_array_equal(found, spread_out[expected])
    w, b = fit_logistic_regression(x, spread_out[labels], num_classes=7, c=1.0, mesh=ONE)
    assert set(np.argsort(-class_scores(test, w, b), axis=1)[:, :4].ravel()) == {0, 2, 3, 5}


def test_two_classes_are_scikit_learns_at_twice_its_c():
    """scikit-learn has one weight vector there: the difference of ours, whose two halves have half its penalty."""
    x, labels, test = clusters()
    x, labels = x[labels < 2], labels[labels < 2]
    reference = LogisticRegression(C=0.02, max_iter=10_000, tol=1e-8).fit(x.astype(np.float64), labels)
    w, b = fit_logistic_regression(x, labels, num_classes=2, c=0.01, mesh=ONE)
    np.testing.assert_allclose(w[:, 1] - w[:, 0], reference.coef_[0], atol=1e-4)


def test_the_logits_of_all_rows_never_stand_at_once(monkeypatch):
    rows, classes = 64 * 100, 50
    monkeypatch.setattr(linear_probe, "ROW_BLOCK", 64)
    shapes = ((np.float32, 4), (np.int32,), (np.float32,))
    examples = tuple(linear_probe._put_blocks(np.zeros((rows, *shape), kind), ONE) for kind, *shape in shapes)
    compiled = linear_probe._fit.lower(examples, rows, 1.0, np.zeros(4), np.ones(4), classes, ONE).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * rows * classes / 5


def test_separable_classes_and_features_that_never_change_are_fine():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = np.zeros((40, 3), np.float32)
        x[:, 0] = np.repeat([-5, 5], 20)
        labels = np.repeat([0, 1], 20)
        predicted = predict(x, labels, x, num_classes=2, c=1e4)
    np.testing.assert_array_equal(predicted, labels)
