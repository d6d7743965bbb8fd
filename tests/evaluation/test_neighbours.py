from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from mae_jax.evaluation import features as knn
from mae_jax.evaluation.features import KNN, find_neighbours, vote


def make_mesh(data, fsdp=1):
    devices = np.array(jax.devices()[: data * fsdp])
    return Mesh(devices.reshape(data, fsdp, 1), ("data", "fsdp", "tensor"))


ONE = make_mesh(1)


def cosines(train, test):
    train, test = train.astype(np.float64), test.astype(np.float64)
    return test @ train.T / np.linalg.norm(test, axis=1)[:, None] / np.linalg.norm(train, axis=1)


def knn_by_loops(train, labels, test, num_classes, k, temperature):
    """The definition, one query and one neighbour at a time, in float64."""
    predictions = []
    for cosine in cosines(train, test):
        votes = np.zeros(num_classes)
        for neighbour in sorted(range(len(train)), key=lambda i: -cosine[i])[:k]:
            votes[labels[neighbour]] += np.exp(cosine[neighbour] / temperature)
        predictions.append(votes.argmax())
    return np.array(predictions)


def predict(train, labels, test, *, num_classes, k, temperature):
    cosine, ids = find_neighbours(train, test, k, ONE)
    return vote(cosine, labels[ids], num_classes=num_classes, k=k, temperature=temperature)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("mesh", [ONE, make_mesh(8), make_mesh(2, 3)], ids=lambda mesh: f"{mesh.size} devices")
def test_neighbours_are_those_of_all_cosines_for_any_number_of_devices_and_blocks(mesh, monkeypatch):
    monkeypatch.setattr(knn, "QUERY_BLOCK", 16)
    monkeypatch.setattr(knn, "TRAIN_BLOCK", 11)
    train, test = normal(0, 203, 8), normal(1, 41, 8)
    expected = cosines(train, test)
    cosine, ids = find_neighbours(train, test, 30, mesh)
    np.testing.assert_array_equal(ids, np.argsort(-expected, axis=1)[:, :30])
    np.testing.assert_allclose(cosine, -np.sort(-expected, axis=1)[:, :30], atol=1e-6)  # float32 rounding


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), count=st.sampled_from([1, 7, 40]), devices=st.sampled_from([1, 8]))
def test_of_equal_cosines_the_lower_index_wins(seed, count, devices):
    rng = np.random.default_rng(seed)
    # Rows of four -1, 0 or 1 with one or four non-zero ones: their norms and cosines are exact in binary.
    signs = rng.choice([-1, 1], size=(count + 9, 4)).astype(np.float32)
    signs *= np.where(rng.integers(2, size=(count + 9, 1)), 1, np.eye(4)[rng.integers(4, size=count + 9)])
    train, test = signs[:count], signs[count:]
    expected = np.argsort(-cosines(train, test), axis=1, kind="stable")[:, :12]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "TRAIN_BLOCK", 4)
        np.testing.assert_array_equal(find_neighbours(train, test, 12, make_mesh(devices))[1], expected)


def test_the_search_leaves_the_features_as_they_are():
    train, test = normal(0, 20, 4), normal(1, 5, 4)
    copies = train.copy(), test.copy()
    find_neighbours(train, test, 3, ONE)
    np.testing.assert_array_equal(train, copies[0])
    np.testing.assert_array_equal(test, copies[1])


def test_similarities_never_stand_whole(monkeypatch):
    """The compiled search needs memory for its blocks only, not for queries x training features."""
    monkeypatch.setattr(knn, "QUERY_BLOCK", 64)
    monkeypatch.setattr(knn, "TRAIN_BLOCK", 128)
    used, search = [], knn._search

    def compiled(*arguments):
        used.append(search.lower(*arguments).compile().memory_analysis().temp_size_in_bytes)
        return search(*arguments)

    monkeypatch.setattr(knn, "_search", compiled)
    find_neighbours(normal(0, 128 * 4, 8), normal(1, 64 * 50, 8), 5, ONE)
    assert len(used) == 4 and max(used) < 10 * 4 * 64 * 128 < 4 * 64 * 50 * 128


def test_predictions_are_those_of_the_definition():
    train, test = normal(0, 60, 8), normal(1, 40, 8)
    labels = np.random.default_rng(0).integers(5, size=60)
    for k, temperature in ((1, 0.07), (20, 0.07), (20, 1.0), (60, 0.5)):
        ours = predict(train, labels, test, num_classes=5, k=k, temperature=temperature)
        np.testing.assert_array_equal(ours, knn_by_loops(train, labels, test, 5, k, temperature))


def test_the_length_of_features_does_not_matter():
    train, test = normal(1, 30, 4), normal(2, 20, 4)
    scales = np.random.default_rng(1).uniform(0.1, 10, size=(30, 1)).astype(np.float32)
    cosine, ids = find_neighbours(train, test, 5, ONE)
    other_cosine, other_ids = find_neighbours(train * scales, test * 100, 5, ONE)
    np.testing.assert_array_equal(ids, other_ids)
    np.testing.assert_allclose(cosine, other_cosine, atol=1e-6)


def test_nearer_neighbours_outvote_more_distant_ones():
    cosine, labels = np.array([[1, 0.2, 0.2]], np.float32), np.array([[0, 1, 1]])
    assert vote(cosine, labels, num_classes=2, k=3, temperature=0.07).tolist() == [0]
    assert vote(cosine, labels, num_classes=2, k=3, temperature=10).tolist() == [1]


def test_a_low_temperature_makes_it_the_nearest_neighbours_class():
    cosine, labels = np.array([[-0.5, -0.6, -0.7]], np.float32), np.array([[2, 1, 1]])
    assert vote(cosine, labels, num_classes=3, k=3, temperature=1e-5).tolist() == [2]


def test_more_queries_than_a_block_and_fewer_examples_than_k_are_fine(monkeypatch):
    for name in ("QUERY_BLOCK", "VOTE_BLOCK"):
        monkeypatch.setattr(knn, name, 10)
    train = np.eye(3, dtype=np.float32)
    prediction = predict(train, np.array([2, 0, 1]), np.tile(train, (9, 1)), num_classes=3, k=20, temperature=0.07)
    np.testing.assert_array_equal(prediction, np.tile([2, 0, 1], 9))


def test_a_sweep_gives_what_each_pair_gives_alone():
    train, test = normal(3, 50, 4), normal(4, 30, 4)
    labels, test_labels = (np.random.default_rng(seed).integers(3, size=n) for seed, n in ((0, 50), (1, 30)))
    features = {"train": (train, labels), "evaluation": (test, test_labels)}
    data = SimpleNamespace(
        features=lambda _, split: features[split], train=SimpleNamespace(label_kind="class", num_classes=3), mesh=ONE
    )
    found = KNN(None, data).sweep(None, (1, 10, 200), (0.03, 0.5))
    pairs = [(k, temperature) for k in (1, 10, 200) for temperature in (0.03, 0.5)]
    assert [(entry["k"], entry["temperature"]) for entry in found] == pairs
    for entry, pair in zip(found, pairs, strict=True):
        assert entry["top1"] == np.mean(knn_by_loops(train, labels, test, 3, *pair) == test_labels)
