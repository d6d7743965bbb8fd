"""Weighted k-nearest-neighbour classification of frozen features."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mae_jax.evaluation.evaluator import EVALUATORS, Evaluator, State
from mae_jax.evaluation.rows import block_layout, put_rows
from mae_jax.runtime.mesh import batch_sharding, put, replicated

# Similarities take QUERY_BLOCK x TRAIN_BLOCK floats at a time on each device, whatever the number of features.
QUERY_BLOCK = 1024
TRAIN_BLOCK = 8192
VOTE_BLOCK = 1024  # queries whose votes, a number for each class, stand at a time


@EVALUATORS.register("knn")
class KNN(Evaluator):
    """Top-1 accuracy of k-NN on the evaluation images, by `evaluate.knn_k` and `.knn_temperature`."""

    measures_features = True

    @property
    def protocol(self) -> str:
        settings = self.config.evaluate
        return f"k-NN: L2-normalised, cosine, k {settings.knn_k}, temperature {settings.knn_temperature}"

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        if self.data.labelled:
            (row,) = self.sweep(state, [self.config.evaluate.knn_k], [self.config.evaluate.knn_temperature])
            yield "knn/top1", row["top1"]

    def sweep(self, state: State, ks: Sequence[int], temperatures: Sequence[float]) -> list[dict[str, float]]:
        """{"k", "temperature", "top1"} for every pair, k outermost, from one search with the largest k."""
        (train, train_labels), (test, test_labels) = (self.data.features(state, s) for s in ("train", "evaluation"))
        cosine, ids = find_neighbours(train, test, max(ks), self.data.mesh)
        rows = []
        for k, temperature in itertools.product(ks, temperatures):
            predicted = vote(
                cosine, train_labels[ids], num_classes=self.data.train.num_classes, k=k, temperature=temperature
            )
            rows.append(dict(k=k, temperature=temperature, top1=float(np.mean(predicted == test_labels))))
        return rows


def find_neighbours(train: np.ndarray, test: np.ndarray, k: int, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """The k training features of largest cosine for every test feature, nearest first; all N of them if k > N.

    The training features are split over the mesh's data axes and stay there; each device goes through its own in
    blocks and keeps its k best, and the devices' candidates are merged. Of equal cosines the lower index comes first,
    for any number of devices.

    Args:
      train: [N, D] float32, in memory or mapped from disk.
      test: [M, D] float32.
      k: number of neighbours, at least 1.

    Returns:
      Cosines [M, k] float32, and the neighbours' rows in `train` [M, k] int32.
    """
    k = min(k, len(train))
    rows, block = put_rows(train, mesh, TRAIN_BLOCK)
    queries, size = block_layout(len(test), 1, QUERY_BLOCK)
    cosine, ids = (np.empty((len(test), k), dtype) for dtype in (np.float32, np.int32))
    for start in range(0, len(test), size):
        part = test[start : start + size]
        padded = np.zeros((size, test.shape[1]), np.float32)
        padded[: len(part)] = part
        found = _search(rows, put(padded, replicated(mesh)), len(train), k, block, mesh)
        for target, values in zip((cosine, ids), found, strict=True):
            target[start : start + len(part)] = np.asarray(values)[: len(part)]
    return cosine, ids


def vote(
    cosine: np.ndarray, neighbour_labels: np.ndarray, *, num_classes: int, k: int, temperature: float
) -> np.ndarray:
    """Predicted classes [M] from the neighbours' cosines and labels [M, at least k], nearest first.

    Each of the k nearest votes for its class with weight exp(cosine / temperature), as in instance discrimination
    (Wu et al. 2018, arXiv 1805.01978, section 3.4). Of classes with equal votes the lowest wins; with fewer than k
    neighbours all vote.
    """
    blocks = range(0, len(cosine), VOTE_BLOCK)
    near = ((cosine[at : at + VOTE_BLOCK, :k], neighbour_labels[at : at + VOTE_BLOCK, :k]) for at in blocks)
    return np.concatenate([_vote(*pair, num_classes, temperature) for pair in near])


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("k", "block", "mesh"))
def _search(rows, queries, count, k, block, mesh):
    axes = batch_sharding(mesh).spec

    def search_share(rows, queries):
        """The k best of this device's rows, of which those from global row `count` on are padding."""
        first = jax.lax.axis_index(axes[0]) * len(rows)

        def search_block(best, numbered_block):
            number, block_rows = numbered_block
            start = first + number * block
            # A normalised copy of all rows would double their memory; that of a block is cheap, here too.
            cosine = jnp.matmul(queries, _unit(block_rows).T, precision="highest")
            cosine = jnp.where(start + jnp.arange(block) < count, cosine, -jnp.inf)
            # top_k takes the earlier of equals: the best so far stand first, since their rows do.
            values, places = jax.lax.top_k(jnp.concatenate([best[0], cosine], axis=1), k)
            earlier = jnp.take_along_axis(best[1], jnp.minimum(places, k - 1), axis=1)
            return (values, jnp.where(places < k, earlier, start + places - k)), None

        none = jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)
        blocks = rows.reshape(-1, block, rows.shape[1])
        return jax.lax.scan(search_block, none, (jnp.arange(len(blocks)), blocks))[0]

    candidates = PartitionSpec(None, *axes)
    cosine, ids = jax.shard_map(
        search_share, mesh=mesh, in_specs=(axes, PartitionSpec()), out_specs=(candidates, candidates), check_vma=False
    )(rows, _unit(queries))
    # Side by side in the order of the devices, so in the order of the rows.
    cosine, ids = (jax.lax.with_sharding_constraint(found, replicated(mesh)) for found in (cosine, ids))
    values, places = jax.lax.top_k(cosine, k)
    return values, jnp.take_along_axis(ids, places, axis=1)


def _vote(cosine, labels, num_classes, temperature):
    # The constant factor exp(-nearest / temperature) prevents overflow, and underflow of all votes at once.
    weights = np.exp((cosine - cosine[:, :1]).astype(np.float64) / temperature)
    places = np.arange(len(labels))[:, None] * num_classes + labels
    votes = np.bincount(places.ravel(), weights.ravel(), minlength=len(labels) * num_classes)
    return votes.reshape(len(labels), num_classes).argmax(axis=1)
