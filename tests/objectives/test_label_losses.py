"""Losses by the kind of the labels, weights of classes, and units of numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight

from mae_jax.data.sources import Source
from mae_jax.models.classifier import ClassifierConfig
from mae_jax.models.config import MAEConfig
from mae_jax.objectives.label_losses import balanced_weights, fit_to_kind, label_loss, make_targets, units_of
from mae_jax.runtime.errors import UserError

RNG = np.random.default_rng(0)
OUTPUTS = RNG.standard_normal((12, 3)).astype(np.float32)
ANY = RNG.integers(0, 2, (12, 3)).astype(np.float32)
NUMBERS = (RNG.standard_normal((12, 3)) * [1, 10, 0.1] + [5, 2000, 0]).astype(np.float32)


class Pictures(Source):
    place = "in a drawer"

    def __init__(self, kind, labels, names=("a", "b", "c")):
        self.label_kind, self.class_names, self._labels = kind, list(names), np.asarray(labels)

    def __len__(self):
        return len(self._labels)

    def labels(self):
        return self._labels


def model_of(kind, **units):
    return ClassifierConfig(MAEConfig(8, 4, 1, 8, 1, 2, 2.0, 8, 1, 2), 3, label_kind=kind, **units)


def settings(**classifier):
    usual = {"label_smoothing": 0.0, "class_weights": None, "num_classes": 3}
    return ConfigDict({"classifier": usual | classifier, "given": tuple(f"classifier.{name}" for name in classifier)})


def test_the_loss_of_several_labels_is_the_mean_of_scikit_learns_log_losses():
    probabilities = 1 / (1 + np.exp(-OUTPUTS.astype(np.float64)))
    expected = [log_loss(ANY[:, k], probabilities[:, k]) for k in range(3)]
    assert label_loss(OUTPUTS, ANY, model_of("multi")) == pytest.approx(np.mean(expected), rel=1e-5)


def test_the_loss_of_numbers_is_the_squared_error_of_standardised_ones():
    model = model_of("number", **units_of(Pictures("number", NUMBERS)))
    scaler = StandardScaler().fit(NUMBERS.astype(np.float64))
    outputs = NUMBERS[::-1]
    expected = np.mean((scaler.transform(outputs) - scaler.transform(NUMBERS)) ** 2)
    assert label_loss(outputs, NUMBERS, model) == pytest.approx(expected, rel=1e-4)


def test_balanced_weights_of_classes_are_scikit_learns_and_a_class_without_examples_has_none():
    labels = np.array([0] * 6 + [2] * 3 + [1])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = balanced_weights(Pictures("class", labels), 4)
    np.testing.assert_allclose(weights, [*expected, 0], rtol=1e-6)


def test_balanced_weights_of_several_labels_are_negatives_per_positive():
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]], np.float32)
    np.testing.assert_array_equal(balanced_weights(Pictures("multi", labels), 3), [3, 1, 1])


@pytest.mark.parametrize("kind", ["class", "multi"])
def test_weights_count_a_classs_examples_so_often_in_parts_of_a_batch_and_in_the_whole(kind):
    model, weights = model_of(kind), np.array([0.5, 2, 3], np.float32)
    labels = np.arange(12) % 3 if kind == "class" else ANY
    targets = make_targets(jnp.asarray(labels), model, 0.0)
    whole = label_loss(OUTPUTS, targets, model, weights)
    parts = [label_loss(OUTPUTS[part], targets[part], model, weights) for part in (slice(6), slice(6, 12))]
    assert np.mean(parts) == pytest.approx(float(whole), rel=1e-6)
    x = OUTPUTS.astype(np.float64)
    if kind == "class":
        losses = (np.log(np.exp(x).sum(1)) - x[np.arange(12), labels]) * weights[labels]
    else:
        p = 1 / (1 + np.exp(-x))
        losses = -np.where(ANY > 0, weights * np.log(p), np.log(1 - p))
    assert float(whole) == pytest.approx(losses.mean(), rel=1e-5)


@pytest.mark.parametrize(
    "kind, changed, told",
    [
        ("multi", dict(label_smoothing=0.1), "classifier.label_smoothing=0.1 is for one class a picture"),
        ("number", dict(class_weights="balanced"), "classifier.class_weights=balanced is for classes, not for numbers"),
        ("multi", dict(num_classes=4), "classifier.num_classes=4, but the labels of the kind multi have 3"),
    ],
)
def test_a_setting_without_meaning_for_the_labels_is_refused(kind, changed, told):
    with pytest.raises(UserError, match=told):
        fit_to_kind(settings(**changed), Pictures(kind, ANY))
    assert not fit_to_kind(settings(), Pictures(kind, ANY))


def test_label_smoothing_that_only_the_config_asks_for_has_no_effect_and_this_is_told():
    config = settings(label_smoothing=0.1)
    config.given = ()
    (told,) = fit_to_kind(config, Pictures("multi", ANY))
    assert "classifier.label_smoothing=0.1 has no effect" in told
    np.testing.assert_array_equal(make_targets(ANY, model_of("multi"), 0.1), ANY)


def test_numbers_that_cannot_be_learned_are_refused():
    with pytest.raises(UserError, match="b is 7 for all of the 12 training images"):
        units_of(Pictures("number", np.where([False, True, False], 7, NUMBERS)))
    missing = NUMBERS.copy()
    missing[5, 1] = np.nan
    with pytest.raises(UserError, match="5 has no label"):
        units_of(Pictures("number", missing))
