"""The training step: one compiled call that takes a state and a batch to the next state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mae_jax.mesh import batch_sharding, replicated
from mae_jax.training.state import TrainState, shardings_of

STATISTICS_MOMENTUM = 0.1  # share of a batch in the running statistics of BatchNorm


class LossDetails(NamedTuple):
    """What a loss function returns besides the mean loss."""

    scalars: dict[str, jax.Array] = {}  # further means over the batch, to report
    statistics: dict[str, Any] = {}  # the batch's statistics, for the running ones


# (params, frozen params, batch, keys [B]) -> (mean loss over the batch, details)
LossFn = Callable[[dict, dict, dict, jax.Array], tuple[jax.Array, LossDetails]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulate_steps: int = 1,
    ema_decay: float | None = None,
) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]:
    """A pure function (state, batch, key) -> (state, scalars).

    The batch's arrays have a leading axis [B]. Example b of step s has the key split(fold_in(key, s), B)[b], however
    the batch is cut and wherever it lies.

    Args:
      accumulate_steps: parts that the batch is cut into; their gradients are averaged before the one update, and so are
        their statistics.
      ema_decay: of the moving average of the parameters, if the state has one.
    """

    def train_step(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        size = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(jax.random.fold_in(key, state.step), size)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accumulate_steps == 1:
            (loss, details), grads = grad_fn(state.params, state.frozen, batch, keys)
        else:
            (loss, details), grads = _accumulate(grad_fn, state, batch, keys, accumulate_steps)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        statistics = optax.incremental_update(details.statistics, state.statistics, STATISTICS_MOMENTUM)
        average = optax.incremental_update(params, state.average, 1 - ema_decay) if state.average else {}
        scalars = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
            **details.scalars,
        }
        return TrainState(state.step + 1, params, opt_state, state.frozen, statistics, average), scalars

    return train_step


def _accumulate(grad_fn, state: TrainState, batch, keys, parts: int):
    """The mean of grad_fn over `parts` equal parts of the batch, one after the other."""

    def cut(x):
        # Runs of rows go to the parts in turn, so that every device keeps the rows that it has; pairs where there can
        # be pairs, since rows 2i and 2i + 1 may be mixed.
        run = 2 if len(x) % (2 * parts) == 0 else 1
        runs = x.reshape(len(x) // (run * parts), parts, run, *x.shape[1:])
        return jnp.moveaxis(runs, 1, 0).reshape(parts, len(x) // parts, *x.shape[1:])

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(state.params, state.frozen, *part)), None

    cut_batch = jax.tree.map(cut, (batch, keys))
    shapes = jax.eval_shape(grad_fn, state.params, state.frozen, *jax.tree.map(lambda x: x[0], cut_batch))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add_part, zeros, cut_batch)
    return jax.tree.map(lambda x: x / parts, total)


def compile_train_step(train_step, state: TrainState, batch: dict, key: jax.Array, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the step for a mesh; the old state's memory is given to the new one.

    Args:
      state, batch: arrays or their abstract shapes, those of the state with their layout.
    """
    state_shardings = shardings_of(state)
    step = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
    )
    return step.lower(state, batch, key).compile()


def memory_in_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Memory of one device that the compiled step needs: state, batch, and everything in between; None if not told."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    sizes = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return sizes - analysis.alias_size_in_bytes
