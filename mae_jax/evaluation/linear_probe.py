"""The linear probe: logistic regression on frozen features."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from mae_jax.evaluation.classification import rank_of_label
from mae_jax.evaluation.evaluator import EVALUATORS, Evaluator, State
from mae_jax.evaluation.rows import put_rows
from mae_jax.runtime.mesh import batch_sharding, replicated

ROW_BLOCK = 8192  # rows whose logits, a number for each class, stand at a time on a device
MAX_ITERATIONS = 1000
# The fit stops when no entry of the gradient of the rows' mean is larger (scikit-learn's default of 1e-4 can leave the
# objective some per cent above its minimum), or after STALLED steps that lower the objective no more in float32.
GRADIENT_TOLERANCE = 1e-6
STALLED = 5
SCALE_ROWS = 16_384  # rows from which the features' scales are estimated


@EVALUATORS.register("linear_probe")
class LinearProbe(Evaluator):
    """Top-1 accuracy of a logistic regression on the evaluation images, by `evaluate.probe_c`."""

    measures_features = True

    @property
    def protocol(self) -> str:
        settings = self.config.evaluate
        return f"linear probe: {f'logistic regression, C {settings.probe_c}' if settings.linear_probe else 'left out'}"

    def run(self, state: State) -> Iterator[tuple[str, float]]:
        if not (self.data.labelled and self.config.evaluate.linear_probe):
            return
        if len(np.unique(self.data.features(state, "train")[1])) > 1:
            (row,) = self.sweep(state, [self.config.evaluate.probe_c])
            yield "linear_probe/top1", row["top1"]

    def sweep(self, state: State, cs: Sequence[float]) -> list[dict[str, float]]:
        """{"c", "top1", "top5"} for every inverse strength of the penalty."""
        data, rows = self.data, []
        (train, train_labels), (test, test_labels) = (data.features(state, split) for split in ("train", "evaluation"))
        for c in cs:
            fitted = fit_logistic_regression(
                train, train_labels, num_classes=data.train.num_classes, c=c, mesh=data.mesh
            )
            rank = np.asarray(rank_of_label(class_scores(test, *fitted), test_labels))
            rows.append({"c": c, "top1": float(np.mean(rank < 1)), "top5": float(np.mean(rank < 5))})
        return rows


def fit_logistic_regression(
    train: np.ndarray, train_labels: np.ndarray, *, num_classes: int, c: float, mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression: weights W [D, K] and intercepts b [K] from features [N, D] and labels [N].

    Minimises the sum of the rows' cross entropies + |W|^2 / (2 c), as scikit-learn's LogisticRegression(C=c) does for
    three classes and more (with two, it penalises the difference of their weights alone). The intercepts are free.
    The features are taken as they are, since they come out of a LayerNorm; they are split over the mesh's data axes,
    in float32. L-BFGS (Liu and Nocedal 1989) makes at most MAX_ITERATIONS steps from zeros. A class without examples
    gets b = -inf: it is never predicted.
    """
    present, targets = np.unique(train_labels, return_inverse=True)
    rows, block = put_rows(train, mesh, ROW_BLOCK)
    targets, _ = put_rows(targets.astype(np.int32), mesh, ROW_BLOCK)
    weights, _ = put_rows(np.ones(len(train), np.float32), mesh, ROW_BLOCK)  # 0 in the rows that only fill up
    mean, scale = _feature_scales(train, len(present), c)
    fitted = _fit(rows, targets, weights, len(train), c, mean, scale, len(present), block, mesh)
    w, b = np.zeros((train.shape[1], num_classes), np.float32), np.full(num_classes, -np.inf, np.float32)
    w[:, present], b[present] = (np.asarray(fitted[name]) for name in ("w", "b"))
    return w, b


def class_scores(features: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Logits [M, K] of features [M, D]."""
    return features @ w + b


def _feature_scales(train, num_classes, c):
    """Means and scales [D] of the variables in which L-BFGS works; they change its path, not the minimum.

    A scale is the root of the objective's second derivative by a weight of the feature at zero, up to a constant: the
    feature's variance times p (1 - p) with p = 1 / K, and the penalty's share.
    """
    sample = train[:: max(1, len(train) // SCALE_ROWS)].astype(np.float64)
    p = 1 / max(num_classes, 2)
    scale = np.sqrt(sample.var(axis=0) + 1 / (p * (1 - p) * c * len(train)))
    return sample.mean(axis=0).astype(np.float32), scale.astype(np.float32)


@functools.partial(jax.jit, static_argnames=("num_classes", "block", "mesh"))
def _fit(rows, targets, weights, count, c, mean, scale, num_classes, block, mesh):
    data_loss = _make_data_loss(rows, targets, weights, block, mesh)

    def original(params):
        """The parameters for the features as they are, from those for (features - mean) / scale."""
        w = params["w"] / scale[:, None]
        return dict(w=w, b=params["b"] - jnp.matmul(mean, w, precision="highest"))

    def objective(params):
        params = original(params)
        return (data_loss(params) + jnp.sum(params["w"] ** 2) / (2 * c)) / count

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

    zeros = dict(w=jnp.zeros((rows.shape[1], num_classes)), b=jnp.zeros(num_classes))
    params, *_ = jax.lax.while_loop(unfinished, step, (zeros, optimizer.init(zeros), 0, 0))
    return jax.lax.with_sharding_constraint(original(params), replicated(mesh))


def _make_data_loss(rows, targets, weights, block, mesh):
    """The summed cross entropy as a function of the parameters."""
    axes = batch_sharding(mesh).spec

    def block_loss(params, block):
        rows, targets, weights = block
        logits = jnp.matmul(rows, params["w"], precision="highest") + params["b"]
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    def share_loss_and_gradient(params, *share):
        blocks = [x.reshape(-1, block, *x.shape[1:]) for x in share]

        def add(sums, block):
            # The gradient of each block is taken at once: the scan's own would keep the logits of all blocks.
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(block_loss)(params, block)), None

        sums, _ = jax.lax.scan(add, (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)), blocks)
        return jax.lax.psum(sums, axes[0])

    loss_and_gradient = jax.shard_map(
        share_loss_and_gradient, mesh=mesh, in_specs=(PartitionSpec(), axes, axes, axes), out_specs=PartitionSpec(),
        check_vma=False,
    )  # fmt: skip

    @jax.custom_vjp
    def loss(params):
        return loss_and_gradient(params, rows, targets, weights)[0]

    loss.defvjp(
        lambda params: loss_and_gradient(params, rows, targets, weights),
        lambda gradient, upstream: (jax.tree.map(lambda x: x * upstream, gradient),),
    )
    return loss
