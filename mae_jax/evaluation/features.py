"""Evaluators of frozen features: weighted k-nearest neighbours, RankMe."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.evaluation.evaluator import Evaluator, State
from mae_jax.evaluation.scores import feature_scores, with_labels
from mae_jax.runtime.mesh import BATCH_AXES, batch_parts, put, replicated, whole

QUERIES = PartitionSpec(None, BATCH_AXES)  # of [blocks, Q, ...]
# A device holds QUERY_BLOCK x TRAIN_BLOCK similarities at a time.
QUERY_BLOCK = 1024
TRAIN_BLOCK = 8192
VOTE_BLOCK = 1024  # queries whose votes the host holds at a time
MAX_ROWS = 25_600  # of RankMe, as in its paper; float64 singular values of [25600, 768] take seconds
EPSILON = 1e-7  # of RankMe's equation 1, for float32 features


class KNN(Evaluator):
    """Scores of k-NN on the evaluation images, with `evaluate.knn_k` and `evaluate.knn_temperature`."""

    measures_features = True

    @property
    def protocol(self) -> str:
        settings = self.config.evaluate
        return f"k-NN: L2-normalised, cosine, k {settings.knn_k}, temperature {settings.knn_temperature}"

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        settings = self.config.evaluate
        if self.data.labelled:
            for row in self.sweep(state, [settings.knn_k], [settings.knn_temperature]):
                yield from ((f"knn/{name}", value) for name, value in row.items() if name not in ("k", "temperature"))

    def sweep(self, state: State, ks: Sequence[int], temperatures: Sequence[float]) -> list[dict[str, float]]:
        """{"k", "temperature", score, ...} for each pair, k outermost, from one search with the largest k.

        The score is "top1"; for labels of other kinds the neighbours' mean gives the `feature_scores`. Empty if no
        picture of a split has a label.
        """
        splits = (with_labels(*self.data.features(state, split)) for split in ("train", "evaluation"))
        (train, train_labels), (test, test_labels) = splits
        if not len(train) or not len(test):
            return []
        cosine, ids = find_neighbours(train, test, max(ks), self.data.mesh)
        kind, num_classes, rows = self.data.train.label_kind, self.data.train.num_classes, []
        for k, temperature in itertools.product(ks, temperatures):
            if kind == "class":
                predicted = vote(cosine, train_labels[ids], num_classes=num_classes, k=k, temperature=temperature)
                scores = {"top1": float(np.mean(predicted == test_labels))}
            else:
                predicted = mean_label(cosine, ids, train_labels, k=k, temperature=temperature)
                scores = feature_scores(kind, test_labels, predicted)
            rows.append(dict(k=k, temperature=temperature) | scores)
        return rows


def find_neighbours(train: np.ndarray, test: np.ndarray, k: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest training features [N, D] by cosine of each test feature [M, D], nearest first; all if k > N.

    Test features are split over devices; training features, which may be a memory map, are read in blocks. Returns
    cosines [M, k] float32 and rows of `train` [M, k] int32; of equal cosines the lower row comes first.
    """
    k, parts = min(k, len(train)), batch_parts(mesh)
    size = min(QUERY_BLOCK, -(-len(test) // parts)) * parts
    shape = -(-len(test) // size), size
    queries = np.zeros((shape[0] * size, test.shape[1]), np.float32)
    queries[: len(test)] = test
    layout = NamedSharding(mesh, QUERIES)
    queries = put(queries.reshape(*shape, -1), layout)
    best = put((np.full((*shape, k), -np.inf, np.float32), np.zeros((*shape, k), np.int32)), layout)
    for start in range(0, len(train), TRAIN_BLOCK):
        rows = put(train[start : start + TRAIN_BLOCK], replicated(mesh))
        best = _search(best, queries, rows, start, mesh)
    cosine, ids = (np.asarray(found).reshape(-1, k)[: len(test)] for found in whole(best))
    return cosine, ids


def vote(
    cosine: np.ndarray, neighbour_labels: np.ndarray, *, num_classes: int, k: int, temperature: float
) -> np.ndarray:
    """Predicted classes [M] from the cosines and labels [M, at least k] of the neighbours, nearest first.

    Each of the k nearest votes with weight exp(cosine / temperature), as in instance discrimination (Wu et al. 2018,
    arXiv 1805.01978, section 3.4). Ties go to the lowest class.
    """
    weights, predicted = vote_weights(cosine[:, :k], temperature), []
    for block in (slice(at, at + VOTE_BLOCK) for at in range(0, len(cosine), VOTE_BLOCK)):
        labels = neighbour_labels[block, :k]
        places = np.arange(len(labels))[:, None] * num_classes + labels
        votes = np.bincount(places.ravel(), weights[block].ravel(), minlength=len(labels) * num_classes)
        predicted.append(votes.reshape(len(labels), num_classes).argmax(axis=1))
    return np.concatenate(predicted)


def mean_label(cosine: np.ndarray, ids: np.ndarray, labels: np.ndarray, *, k: int, temperature: float) -> np.ndarray:
    """The mean label, float64 [M, K], of the k nearest of the neighbours [M, at least k], weighted as in `vote`.

    `ids` are their rows of the training labels [N, K]: of classes that apply or not, or of numbers.
    """
    weights, means = vote_weights(cosine[:, :k], temperature), []
    weights /= weights.sum(axis=1, keepdims=True)
    for block in (slice(at, at + VOTE_BLOCK) for at in range(0, len(cosine), VOTE_BLOCK)):
        means.append(np.einsum("mk,mkc->mc", weights[block], labels[ids[block, :k]]))
    return np.concatenate(means)


def vote_weights(cosine: np.ndarray, temperature: float) -> np.ndarray:
    """exp(cosine / temperature) of the neighbours [M, k], nearest first, in units of that of the nearest: float64."""
    # Subtracting the nearest cosine prevents overflow, and underflow of all votes at once.
    return np.exp((cosine - cosine[:, :1]).astype(np.float64) / temperature)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _search(best, queries, rows, start, mesh):
    """Updates the best (cosine, row) [blocks, Q, k] of queries [blocks, Q, D] with rows [n, D], numbered from start."""
    ids, rows, k = start + jnp.arange(len(rows)), _unit(rows), best[0].shape[-1]

    def search_block(block):
        (cosine, known), queries = block
        found = jnp.matmul(_unit(queries), rows.T, precision="highest")
        # top_k prefers the earlier of equals, so the best so far, with lower rows, come first.
        cosine, places = jax.lax.top_k(jnp.concatenate([cosine, found], axis=1), k)
        known = jnp.concatenate([known, jnp.broadcast_to(ids, found.shape)], axis=1)
        return cosine, jnp.take_along_axis(known, places, axis=1)

    # Without shard_map, XLA gathers the queries of all devices for top_k.
    search = functools.partial(jax.lax.map, search_block)
    return jax.shard_map(search, mesh=mesh, in_specs=QUERIES, out_specs=QUERIES, check_vma=False)((best, queries))


class RankMe(Evaluator):
    """The effective rank of the training features."""

    measures_features = True
    protocol = "RankMe: of the training features"

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        if self.data.labelled:  # like the other evaluators: without labels, no features are computed
            yield "rankme", rankme(self.data.features(state, "train")[0])


def rankme(features: np.ndarray) -> float:
    """Effective rank, from 1 to min(N, D), of features [N, D] (Garrido et al. 2022, arXiv 2210.02885, eq. 1-2).

    exp of the entropy of p_k = sigma_k / sum(sigma) + EPSILON with singular values sigma_k. Beyond MAX_ROWS features,
    evenly spaced ones are used, since a folder's pictures are sorted by class.
    """
    rows = np.linspace(0, len(features) - 1, min(len(features), MAX_ROWS)).round().astype(np.int64)
    # In float64 and not by the Gram matrix: its eigenvalues are squares, so small ones would be lost.
    sigma = np.linalg.svd(features[rows].astype(np.float64), compute_uv=False)
    p = sigma / max(sigma.sum(), np.finfo(np.float64).tiny) + EPSILON
    return float(np.exp(-np.sum(p * np.log(p))))
