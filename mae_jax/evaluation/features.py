"""Evaluators of frozen features: weighted k-nearest neighbours, the linear probe, RankMe."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.evaluation.classification import rank_of_label
from mae_jax.evaluation.evaluator import Evaluator, State
from mae_jax.runtime.mesh import BATCH_AXES, batch_parts, batch_sharding, put, replicated, whole

QUERIES = PartitionSpec(None, BATCH_AXES)  # of [blocks, Q, ...]
# A device holds QUERY_BLOCK x TRAIN_BLOCK similarities at a time.
QUERY_BLOCK = 1024
TRAIN_BLOCK = 8192
VOTE_BLOCK = 1024  # queries whose votes the host holds at a time
ROW_BLOCK = 8192  # examples whose logits a device holds at a time
MAX_ITERATIONS = 1000  # of the fit
# The fit stops when no entry of the mean gradient exceeds this (scikit-learn's 1e-4 can leave the objective a few per
# cent above its minimum), or after STALLED steps without progress in float32.
GRADIENT_TOLERANCE = 1e-6
STALLED = 5
SCALE_ROWS = 16_384  # rows for estimating the features' scales
MAX_ROWS = 25_600  # of RankMe, as in its paper; float64 singular values of [25600, 768] take seconds
EPSILON = 1e-7  # of RankMe's equation 1, for float32 features


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


class LinearProbe(Evaluator):
    """Top-1 accuracy of logistic regression on the evaluation images, with C = `evaluate.probe_c`."""

    measures_features = True

    @property
    def protocol(self) -> str:
        settings = self.config.evaluate
        return f"linear probe: {f'logistic regression, C {settings.probe_c}' if settings.linear_probe else 'left out'}"

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        wanted = self.data.labelled and self.config.evaluate.linear_probe
        if wanted and len(np.unique(self.data.features(state, "train")[1])) > 1:
            yield "linear_probe/top1", self.sweep(state, [self.config.evaluate.probe_c])[0]["top1"]

    def sweep(self, state: State, cs: Sequence[float]) -> list[dict[str, float]]:
        """{"c", "top1", "top5"} for each inverse penalty strength c."""
        (train, train_labels), (test, test_labels) = (self.data.features(state, s) for s in ("train", "evaluation"))
        rows, num_classes = [], self.data.train.num_classes
        for c in cs:
            w, b = fit_logistic_regression(train, train_labels, num_classes=num_classes, c=c, mesh=self.data.mesh)
            rank = np.asarray(rank_of_label(test @ w + b, test_labels))
            rows.append({"c": c, "top1": float(np.mean(rank < 1)), "top5": float(np.mean(rank < 5))})
        return rows


def fit_logistic_regression(
    train: np.ndarray, train_labels: np.ndarray, *, num_classes: int, c: float, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression: weights W [D, K] and intercepts b [K] from features [N, D] and labels [N].

    Minimises the summed cross-entropy + |W|^2 / (2 c) by L-BFGS (Liu and Nocedal 1989) from zeros. scikit-learn's
    LogisticRegression(C=c) has the same objective for three or more classes; for two it penalises only the difference
    of their weights. A class without examples gets b = -inf and is never predicted. Examples are split over devices.
    """
    present, targets = np.unique(train_labels, return_inverse=True)
    weights = np.ones(len(train), np.float32)
    examples = tuple(_put_blocks(x, mesh) for x in (train, targets.astype(np.int32), weights))
    # The scales are the roots of the objective's curvature at zero, which condition L-BFGS.
    sample, p = train[:: max(1, len(train) // SCALE_ROWS)].astype(np.float64), 1 / max(len(present), 2)
    scale = np.sqrt(sample.var(axis=0) + 1 / (p * (1 - p) * c * len(train))).astype(np.float32)
    fitted = _fit(examples, len(train), c, sample.mean(axis=0).astype(np.float32), scale, len(present), mesh)
    w, b = np.zeros((train.shape[1], num_classes), np.float32), np.full(num_classes, -np.inf, np.float32)
    w[:, present], b[present] = (np.asarray(fitted[name]) for name in ("w", "b"))
    return w, b


def _put_blocks(rows: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows [N, ...] as [parts, blocks, block, ...], one part a device, padded with zeros."""
    parts = batch_parts(mesh)
    share = -(-len(rows) // parts)
    blocks = -(-share // ROW_BLOCK)
    block = -(-share // blocks)
    filled = np.zeros((parts * blocks * block, *rows.shape[1:]), rows.dtype)
    filled[: len(rows)] = rows
    return put(filled.reshape(parts, blocks, block, *rows.shape[1:]), batch_sharding(mesh))


@functools.partial(jax.jit, static_argnames=("num_classes", "mesh"))
def _fit(examples, count, c, mean, scale, num_classes, mesh):
    def original(params):
        """Converts parameters for (features - mean) / scale to parameters for the features."""
        w = params["w"] / scale[:, None]
        return dict(w=w, b=params["b"] - jnp.matmul(mean, w, precision="highest"))

    def part_loss(params, part):
        @jax.checkpoint  # the backward pass, too, holds the logits of one block at a time
        def block_loss(loss, number):
            rows, targets, weights = (x[number] for x in part)
            logits = jnp.matmul(rows, params["w"], precision="highest") + params["b"]
            return loss + jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets)), None

        return jax.lax.scan(block_loss, 0.0, jnp.arange(len(part[0])))[0]

    def objective(params):
        params = original(params)
        # A copy of the parameters for each part gives it a gradient of its own: they are summed only once.
        copies = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(examples[0]), *x.shape)), params)
        copies = jax.lax.with_sharding_constraint(copies, batch_sharding(mesh))
        losses = jax.vmap(part_loss)(copies, examples)
        return (jnp.sum(losses) + jnp.sum(params["w"] ** 2) / (2 * c)) / count

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def unfinished(carry):
        _, state, step, stalled = carry
        steep = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf) > GRADIENT_TOLERANCE
        return (step == 0) | (steep & (step < MAX_ITERATIONS) & (stalled < STALLED))

    def step(carry):
        params, state, step, stalled = carry
        value, gradient = value_and_grad(params, state=state)
        updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=objective)
        lower = optax.tree.get(state, "value") < value * (1 - jnp.finfo(jnp.float32).eps)
        return optax.apply_updates(params, updates), state, step + 1, jnp.where(lower, 0, stalled + 1)

    zeros = dict(w=jnp.zeros((len(mean), num_classes)), b=jnp.zeros(num_classes))
    params, *_ = jax.lax.while_loop(unfinished, step, (zeros, optimizer.init(zeros), 0, 0))
    return jax.lax.with_sharding_constraint(original(params), replicated(mesh))


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
