"""Neighbours without the query itself, recall and average precision, against scikit-learn."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors

from mae_jax.evaluation.retrieval import Neighbours, average_precisions, find_others, find_own, score


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]).reshape(count, 1, 1), ("data", "fsdp", "tensor"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("devices", [1, 8])
def test_neighbours_are_scikit_learns_without_the_query_itself(devices):
    index, names = normal(0, 57, 8), [f"{n}.png" for n in range(57)]
    names[20] = "3.png"  # as from a second folder of copies
    queries, query_names = np.concatenate([index[:11], normal(1, 6, 8)]), [*names[:11], *"abcdef"]
    found = find_others(index, queries, find_own(names, query_names), 10, mesh_of(devices))
    for query, name in enumerate(query_names):
        others = np.array([row for row in range(57) if names[row] != name])
        near = NearestNeighbors(n_neighbors=10, metric="cosine").fit(index[others].astype(np.float64))
        distances, rows = near.kneighbors(queries[query : query + 1].astype(np.float64))
        np.testing.assert_array_equal(found.rows[query], others[rows[0]])
        np.testing.assert_allclose(found.cosine[query], 1 - distances[0], atol=1e-6)


def test_a_small_index_gives_all_that_it_has():
    index = normal(0, 3, 4)
    found = find_others(index, index, find_own("abc", "abx"), 10, mesh_of(1))
    assert [sorted(rows) for rows in found.rows.tolist()] == [[-1, 1, 2], [-1, 0, 2], [0, 1, 2]]
    assert (found.rows[:2, -1] == -1).all()


@pytest.mark.parametrize("ties", [False, True])
def test_average_precisions_are_scikit_learns_over_the_whole_ranking(ties, monkeypatch):
    monkeypatch.setattr("mae_jax.evaluation.retrieval.BLOCK", 200)  # a few queries at a time
    rng = np.random.default_rng(0)
    index, queries = normal(0, 80, 6), normal(1, 30, 6)
    if ties:  # one or four of four equal parts: norms and cosines are exact in binary
        signs = rng.choice([-1, 1], size=(110, 4)) * np.where(
            rng.integers(2, size=(110, 1)), 1, np.eye(4)[rng.integers(4, size=110)]
        )
        index, queries = np.split(signs.astype(np.float32), [80])
    labels, query_labels = rng.integers(-1, 4, size=80), rng.integers(-1, 5, size=30)
    queries[:9], query_labels[:9] = index[:9], labels[:9]
    own = find_own([str(n) for n in range(80)], [str(n) for n in range(9)] + [f"q{n}" for n in range(21)])
    found = average_precisions(index, queries, own, labels, query_labels)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (index.astype(np.float64), queries)]
    for query, label in enumerate(query_labels):
        kept = np.arange(80) != (query if query < 9 else -1)
        relevant = labels[kept] == label
        if label < 0 or not relevant.any():
            assert np.isnan(found[query])
        else:
            expected = average_precision_score(relevant, (unit[0] @ unit[1][query])[kept])
            assert found[query] == pytest.approx(expected, rel=1e-6)
    assert 0 < np.isnan(found).sum() < 20


def test_recall_is_the_share_of_scored_queries_with_one_of_their_label_among_the_nearest():
    rng = np.random.default_rng(0)
    labels, query_labels = rng.integers(0, 9, size=50), rng.integers(0, 9, size=40)
    rows = np.stack([rng.permutation(50)[:10] for _ in range(40)])
    rows[3, 4:] = -1
    precisions = np.where(np.arange(40) % 4 == 0, np.nan, rng.uniform(size=40))
    found = score(Neighbours(np.zeros(rows.shape), rows), precisions, labels, query_labels)
    scored = [query for query in range(40) if query % 4]
    for k in (1, 5, 10):
        hits = [query_labels[query] in [labels[row] for row in rows[query, :k] if row >= 0] for query in scored]
        assert found[f"recall_at_{k}"] == pytest.approx(np.mean(hits))
    assert found["map"] == pytest.approx(np.mean([precisions[query] for query in scored]))


def test_without_labels_nothing_is_scored():
    labels, near = np.full(4, -1), Neighbours(np.zeros((2, 3)), np.zeros((2, 3), int))
    features = normal(0, 4, 3)
    precisions = average_precisions(features, features[:2], find_own("abcd", "xy"), labels, np.array([0, -1]))
    assert np.isnan(precisions).all() and score(near, precisions, labels, labels[:2]) == {}
