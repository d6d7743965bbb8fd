"""The evaluator of frozen features by a linear model: logistic regression, or ridge regression of numbers."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from mae_jax.evaluation.classification import rank_of_label
from mae_jax.evaluation.evaluator import Evaluator, State
from mae_jax.evaluation.scores import feature_scores, with_labels
from mae_jax.runtime.mesh import batch_parts, batch_sharding, put, replicated

ROW_BLOCK = 8192  # examples whose logits a device holds at a time
MAX_ITERATIONS = 1000  # of the fit
# The fit stops when no entry of the mean gradient exceeds this (scikit-learn's 1e-4 can leave the objective a few per
# cent above its minimum), or after STALLED steps without progress in float32.
GRADIENT_TOLERANCE = 1e-6
STALLED = 5
SCALE_ROWS = 16_384  # rows for estimating the features' scales
METHODS = {
    "class": "logistic regression",
    "multi": "a logistic regression for each class",
    "number": "ridge regression with alpha 1 / C",
}


class LinearProbe(Evaluator):
    """Scores of logistic regression (of numbers: of ridge regression) on the evaluation images.

    C = `evaluate.probe_c`, so the ridge's alpha is 1 / C.
    """

    measures_features = True

    @property
    def protocol(self) -> str:
        settings = self.config.evaluate
        method = f"{METHODS[self.data.evaluation.label_kind]}, C {settings.probe_c}"
        return f"linear probe: {method if settings.linear_probe else 'left out'}"

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        wanted = self.data.labelled and self.config.evaluate.linear_probe
        if wanted and len(np.unique(self.data.features(state, "train")[1])) > 1:
            for row in self.sweep(state, [self.config.evaluate.probe_c]):
                shown = ((name, value) for name, value in row.items() if name not in ("c", "top5"))
                yield from ((f"linear_probe/{name}", value) for name, value in shown)

    def sweep(self, state: State, cs: Sequence[float]) -> list[dict[str, float]]:
        """{"c", "top1", "top5"}, or {"c"} and `feature_scores`, for each inverse penalty strength c.

        Empty if no picture of a split has a label.
        """
        splits = (with_labels(*self.data.features(state, split)) for split in ("train", "evaluation"))
        (train, train_labels), (test, test_labels) = splits
        rows, num_classes, mesh = [], self.data.train.num_classes, self.data.mesh
        for c in cs if len(train) and len(test) else ():
            if self.data.train.label_kind == "number":
                w, b = fit_ridge_regression(train, train_labels, c=c)
            else:
                w, b = fit_logistic_regression(train, train_labels, num_classes=num_classes, c=c, mesh=mesh)
            outputs = test @ w + b
            if self.data.train.label_kind == "class":
                rank = np.asarray(rank_of_label(outputs, test_labels))
                scores = {"top1": float(np.mean(rank < 1)), "top5": float(np.mean(rank < 5))}
            else:
                scores = feature_scores(self.data.train.label_kind, test_labels, outputs)
            rows.append({"c": c} | scores)
        return rows


def fit_logistic_regression(
    train: np.ndarray, train_labels: np.ndarray, *, num_classes: int, c: float, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression: weights W [D, K] and intercepts b [K] from features [N, D] and labels [N].

    Minimises the summed cross-entropy + |W|^2 / (2 c) by L-BFGS (Liu and Nocedal 1989) from zeros. scikit-learn's
    LogisticRegression(C=c) has the same objective for three or more classes; for two it penalises only the difference
    of their weights. A class without examples gets b = -inf and is never predicted. Examples are split over devices.

    Labels [N, K] of 0 and 1 give K regressions of one class each, with the loss of a sigmoid: each is scikit-learn's of
    two classes. Of a class that applies to all or no examples, b is the log-odds with half an example more of either.
    """
    w, b = np.zeros((train.shape[1], num_classes), np.float32), np.full(num_classes, -np.inf, np.float32)
    if train_labels.ndim == 1:
        present, targets = np.unique(train_labels, return_inverse=True)
        targets, p = targets.astype(np.int32), 1 / max(len(present), 2)
    else:
        positive = np.count_nonzero(train_labels, axis=0)
        present, p = np.flatnonzero((positive > 0) & (positive < len(train))), 1 / 2
        targets, b[:] = train_labels[:, present], np.log((positive + 0.5) / (len(train) - positive + 0.5))
        if not len(present):
            return w, b
    weights = np.ones(len(train), np.float32)
    examples = tuple(_put_blocks(x, mesh) for x in (train, targets, weights))
    # The scales are the roots of the objective's curvature at zero, which condition L-BFGS.
    sample = train[:: max(1, len(train) // SCALE_ROWS)].astype(np.float64)
    scale = np.sqrt(sample.var(axis=0) + 1 / (p * (1 - p) * c * len(train))).astype(np.float32)
    fitted = _fit(examples, len(train), c, sample.mean(axis=0).astype(np.float32), scale, len(present), mesh)
    w[:, present], b[present] = (np.asarray(fitted[name]) for name in ("w", "b"))
    return w, b


def fit_ridge_regression(train: np.ndarray, numbers: np.ndarray, *, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights W [D, K] and intercepts b [K] of numbers [N, K] that minimise the summed squared error + |W|^2 / c."""
    from sklearn.linear_model import Ridge  # slow to import: a second

    fitted = Ridge(alpha=1 / c).fit(train.astype(np.float64), numbers)
    return np.atleast_2d(fitted.coef_).T, np.atleast_1d(fitted.intercept_)


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
            if targets.ndim == 1:
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            else:
                losses = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=1)
            return loss + jnp.sum(weights * losses), None

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
