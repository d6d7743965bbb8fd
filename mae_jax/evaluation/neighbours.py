"""Weighted k-nearest-neighbour classification of frozen features."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.evaluation.evaluator import Evaluator, State
from mae_jax.runtime.mesh import BATCH_AXES, batch_parts, put, replicated, whole

QUERIES = PartitionSpec(None, BATCH_AXES)  # of [blocks, Q, ...]
# A device holds QUERY_BLOCK x TRAIN_BLOCK similarities at a time.
QUERY_BLOCK = 1024
TRAIN_BLOCK = 8192
VOTE_BLOCK = 1024  # queries whose votes the host holds at a time


class KNN(Evaluator):
    """Top-1 accuracy of k-NN on the evaluation images, with `evaluate.knn_k` and `evaluate.knn_temperature`."""

    measures_features = True

    @property
    def protocol(self) -> str:
        settings = self.config.evaluate
        return f"k-NN: L2-normalised, cosine, k {settings.knn_k}, temperature {settings.knn_temperature}"

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        settings = self.config.evaluate
        if self.data.labelled:
            yield "knn/top1", self.sweep(state, [settings.knn_k], [settings.knn_temperature])[0]["top1"]

    def sweep(self, state: State, ks: Sequence[int], temperatures: Sequence[float]) -> list[dict[str, float]]:
        """{"k", "temperature", "top1"} for each pair, k outermost, from one search with the largest k."""
        (train, train_labels), (test, test_labels) = (self.data.features(state, s) for s in ("train", "evaluation"))
        cosine, ids = find_neighbours(train, test, max(ks), self.data.mesh)
        labels, num_classes, rows = train_labels[ids], self.data.train.num_classes, []
        for k, temperature in itertools.product(ks, temperatures):
            predicted = vote(cosine, labels, num_classes=num_classes, k=k, temperature=temperature)
            rows.append(dict(k=k, temperature=temperature, top1=float(np.mean(predicted == test_labels))))
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
    # Subtracting the nearest cosine prevents overflow, and underflow of all votes at once.
    weights = np.exp((cosine[:, :k] - cosine[:, :1]).astype(np.float64) / temperature)
    predicted = []
    for block in (slice(at, at + VOTE_BLOCK) for at in range(0, len(cosine), VOTE_BLOCK)):
        labels = neighbour_labels[block, :k]
        places = np.arange(len(labels))[:, None] * num_classes + labels
        votes = np.bincount(places.ravel(), weights[block].ravel(), minlength=len(labels) * num_classes)
        predicted.append(votes.reshape(len(labels), num_classes).argmax(axis=1))
    return np.concatenate(predicted)


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
