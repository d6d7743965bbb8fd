"""Least squares on a few examples of each class, against scikit-learn."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge, RidgeCV

from mae_jax.data.sources import some_of_each_class
from mae_jax.evaluation.few_shot import STD_FLOOR, FewShot, fit_shots

PENALTIES = [1.0, 30.0, 1000.0]


def shots(width, classes=(0, 2, 5), each=4):
    """(features, labels, test features) of overlapping clusters; features of scales 0.1 to 10."""
    rng = np.random.default_rng(width)
    labels, scale = np.repeat(classes, each), np.logspace(-1, 1, width)
    x, test = rng.normal(size=(2, len(labels), width)) + rng.normal(size=(6, width))[labels]
    return (x * scale).astype(np.float32), labels, (test * scale).astype(np.float32)


@pytest.mark.parametrize("width", [3, 40], ids=["more examples than features", "fewer"])
def test_predictions_and_leave_one_out_errors_are_those_of_scikit_learns_ridge(width):
    x, labels, test = shots(width)
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64) + STD_FLOOR
    z, z_test = (x - mean) / std, (test - mean) / std
    onehot = (labels[:, None] == [0, 2, 5]).astype(np.float64)
    found = fit_shots(x, labels, test, PENALTIES)
    for penalty, (error, predicted) in zip(PENALTIES, found, strict=True):
        outputs = Ridge(alpha=penalty).fit(z, onehot).predict(z_test)
        np.testing.assert_array_equal(predicted, np.array([0, 2, 5])[outputs.argmax(axis=1)])
        left_out = [
            onehot[i] - Ridge(alpha=penalty).fit(np.delete(z, i, 0), np.delete(onehot, i, 0)).predict(z[i : i + 1])[0]
            for i in range(len(z))
        ]
        assert error == pytest.approx(np.mean(np.square(left_out)), rel=1e-6)
    best = RidgeCV(alphas=PENALTIES).fit(z, onehot).alpha_
    assert PENALTIES[int(np.argmin([error for error, _ in found]))] == best


def test_features_that_never_change_and_a_single_shot_are_fine():
    x, labels, test = shots(8, each=1)
    x[:, 2] = test[:, 2] = 7
    for error, predicted in fit_shots(x, labels, test, PENALTIES):
        assert np.isfinite(error) and set(predicted) <= {0, 2, 5}


def test_a_draw_has_the_same_number_of_every_class_or_all_of_a_smaller_one_and_draws_differ():
    labels = np.repeat([0, 1, 3], [50, 2, 70])
    draws = [some_of_each_class(labels, lambda _: 5, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    for draw in draws:
        assert np.bincount(labels[draw]).tolist() == [5, 2, 0, 5] and len(set(draw)) == 12
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()


def few_shot_of(train_labels, **settings):
    """The evaluator on the pixels of the digits."""
    pixels, labels = load_digits(return_X_y=True)
    pixels, train = (pixels / 16).astype(np.float32), np.flatnonzero(train_labels(labels[:1200]))
    splits = {"train": (pixels[train], labels[train]), "evaluation": (pixels[1200:], labels[1200:])}
    evaluate = dict(shots=(5, 10), shot_draws=3, shot_penalties=(1.0, 64.0)) | settings
    source = SimpleNamespace(label_kind="class", num_classes=10, class_names=[f"digit {i}" for i in range(10)])
    data = SimpleNamespace(labelled=True, train=source, features=lambda state, split: splits[split])
    return FewShot(ConfigDict({"data": {"seed": 0}, "evaluate": evaluate}), data), splits


def test_the_mean_and_deviation_are_over_the_draws_each_with_its_own_penalty():
    few_shot, splits = few_shot_of(lambda labels: labels >= 0)
    found, (train, labels), (test, test_labels) = dict(few_shot.run(None)), *splits.values()
    for count in (5, 10):
        top1 = []
        for draw in range(3):
            rows = some_of_each_class(labels, lambda _, n=count: n, np.random.default_rng((0, draw)))
            x, y = train[rows], labels[rows]
            scale = x.std(axis=0, dtype=np.float64) + STD_FLOOR
            ridge = RidgeCV(alphas=(1.0, 64.0)).fit((x - x.mean(axis=0)) / scale, np.eye(10)[y])
            top1.append(np.mean(ridge.predict((test - x.mean(axis=0)) / scale).argmax(axis=1) == test_labels))
        assert found[f"{count}_shot/top1"] == pytest.approx(np.mean(top1), abs=2 / len(test))
        assert found[f"{count}_shot/top1_std"] == pytest.approx(np.std(top1), abs=2 / len(test))
    assert found["5_shot/top1"] < found["10_shot/top1"] and found.keys() == {
        f"{count}_shot/{name}" for count in (5, 10) for name in ("top1", "top1_std")
    }  # fmt: skip


def test_classes_with_fewer_images_than_shots_are_named_in_one_line(capsys):
    def three_sevens(labels):
        return (labels != 7) | (np.cumsum(labels == 7) <= 3)

    few_shot, _ = few_shot_of(three_sevens, shots=(2, 5), shot_draws=1)
    few_shot.sweep(None)
    assert capsys.readouterr().out == "note: 5 shots: classes with fewer training images: digit 7 (3)\n"
