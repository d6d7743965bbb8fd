import numpy as np
import pytest

from mae_jax.evaluation import features as module
from mae_jax.evaluation.features import rankme


def with_singular_values(sigma, rows=50):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(sigma))))[0] for n in (rows, len(sigma)))
    return left * sigma @ right.T


def test_features_that_use_all_directions_alike_have_their_width_as_rank():
    features = np.random.default_rng(0).normal(size=(20_000, 16)).astype(np.float32)
    assert rankme(features) == pytest.approx(16, rel=1e-3)


def test_features_along_one_direction_have_rank_one():
    features = np.outer(np.arange(1, 101), np.arange(1, 9)).astype(np.float32)
    assert rankme(features) == pytest.approx(1, abs=1e-4)
    assert rankme(np.zeros((5, 3), np.float32)) == pytest.approx(1, abs=1e-4)


def test_singular_values_one_and_three_have_the_rank_of_a_quarter_and_three_quarters():
    """exp(entropy of (1/4, 3/4)) = 4 / 3^(3/4); the paper's 1e-7 is below the tolerance."""
    assert rankme(with_singular_values([3.0, 1.0])) == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_neither_scale_nor_rotation_matters_and_nothing_is_centred():
    features = with_singular_values(np.array([5.0, 2.0, 1.0, 1e-3]))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    assert rankme(1000 * features @ rotation) == pytest.approx(rankme(features), rel=1e-9)
    assert rankme(features + 100) < 1.1 < rankme(features)


def test_of_many_features_rows_at_even_distances_are_taken(monkeypatch):
    """The first half lies along one direction, the second along another: a sample of the front would see rank 1."""
    monkeypatch.setattr(module, "MAX_ROWS", 10)
    features = np.repeat(np.eye(2), 500, axis=0)
    assert rankme(features) == pytest.approx(2, rel=1e-5)
