"""The training step: one compiled call from a state and a batch to the next state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from mae_jax.objectives.objective import LossFn
from mae_jax.runtime.mesh import BATCH_AXES, batch_sharding, compiler_options, parameter_specs, replicated
from mae_jax.runtime.sharding import ROWS, axes_of, batch_devices, mean_over_batch, on_shards, vary, varying
from mae_jax.training.state import TrainState, shardings_of

STATISTICS_MOMENTUM = 0.1  # weight of a new batch in the running statistics of BatchNorm


class Parts(NamedTuple):
    """How a batch is cut into parts for gradient accumulation."""

    count: int
    run: int  # rows that stay together


# (state, batch, the run's key) -> (state, scalars)
TrainStep = Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    accumulate_steps: int = 1,
    ema_decay: float | None = None,
    mixes_pairs: bool = False,
    skip_nonfinite: int = 0,
) -> TrainStep:
    """A pure function (state, batch [B, ...], key) -> (state, scalars).

    Example b of step s has the key split(fold_in(key, s), B)[b] on any number of parts and devices. The scalar `finite`
    says whether the new state is finite, whatever the loss.

    Args:
      loss_fn: gets one device's rows.
      accumulate_steps: parts of a batch; their gradients and statistics are averaged before the update.
      mixes_pairs: rows 2i and 2i + 1 must stay together.
      skip_nonfinite: the most updates to skip because loss, gradient or new state is not finite.
    """
    parts = Parts(accumulate_steps, 2 if mixes_pairs else 1)

    def train_step(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        size = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(jax.random.fold_in(key, state.step), size)
        specs = parameter_specs(state.params)
        (loss, details), grads = on_shards(
            functools.partial(_mean_gradients, loss_fn, specs, parts),
            mesh,
            in_specs=(specs, parameter_specs(state.frozen), ROWS, ROWS),
            out_specs=(PartitionSpec(), specs),
        )(state.params, state.frozen, batch, keys)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        statistics = optax.incremental_update(details.statistics, state.statistics, STATISTICS_MOMENTUM)
        average = optax.incremental_update(params, state.average, 1 - ema_decay) if state.average else {}
        scalars = {
            "loss": loss,
            # Without the barrier, XLA stores the squares to share them with AdamW, which is slower.
            "grad_norm": optax.tree.norm(jax.lax.optimization_barrier(grads)),
            # The optimizer does not count skipped updates.
            "learning_rate": schedule(state.step - state.skipped),
            **details.scalars,
        }
        new = TrainState(state.step + 1, params, opt_state, state.frozen, statistics, average, state.skipped)
        scalars["finite"] = _all_finite((params, opt_state, statistics, average))
        if skip_nonfinite:
            finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(scalars["grad_norm"]) & scalars["finite"]
            skip = ~finite & (state.skipped < skip_nonfinite)
            kept = jax.tree.map(lambda old, new: jnp.where(skip, old, new), state, new)
            new = kept._replace(step=new.step, skipped=state.skipped + skip)
            scalars["skipped"] = new.skipped
        return new, scalars

    return train_step


def _all_finite(tree: Any) -> jax.Array:
    """Whether a tree is finite: a bool scalar. XLA fuses this with writing the values."""
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)])


def _mean_gradients(
    loss_fn: LossFn, specs: dict, parts: Parts, params: dict, frozen: dict, batch: dict, keys: jax.Array
):
    """On shards: ((loss, details), gradients), means over the global batch; gradients are sharded like parameters.

    Gradients are summed over data once, after all parts. Those of sharded parameters were already summed over fsdp in
    the backward pass, since a device has no room for full ones.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if parts.count == 1:
        (loss, details), grads = grad_fn(params, frozen, batch, keys)
    else:
        (loss, details), grads = _accumulate(grad_fn, params, frozen, (batch, keys), parts)

    def mean(gradient, spec):
        axes = axes_of(("data",) if "fsdp" in spec else BATCH_AXES)
        return (jax.lax.psum(gradient, axes) if axes else gradient) / batch_devices()

    return mean_over_batch((loss, details)), jax.tree.map(mean, grads, specs)


def _accumulate(grad_fn, params: dict, frozen: dict, rows, parts: Parts):
    """The mean of grad_fn over the parts of a device's rows."""

    def cut(x):
        # Parts take rows in turn, so each part has the same rows on any number of devices.
        count, run = parts
        runs = x.reshape(len(x) // (run * count), count, run, *x.shape[1:])
        return jnp.moveaxis(runs, 1, 0).reshape(count, len(x) // count, *x.shape[1:])

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, grad_fn(params, frozen, *part)), None

    cut_rows = jax.tree.map(cut, rows)
    shapes = jax.eval_shape(grad_fn, params, frozen, *jax.tree.map(lambda x: x[0], cut_rows))
    zeros = jax.tree.map(lambda s: vary(jnp.zeros(s.shape, s.dtype), varying(s)), shapes)
    total, _ = jax.lax.scan(add_part, zeros, cut_rows)
    return jax.tree.map(lambda x: x / parts.count, total)


def compile_train_step(train_step, state: TrainState, batch: dict, key: jax.Array, mesh: Mesh) -> jax.stages.Compiled:
    """Compiles the step for a mesh and donates the state; arrays may be abstract, with shardings in the state."""
    state_shardings = shardings_of(state)
    step = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(state_shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=(state_shardings, replicated(mesh)),
    )
    return step.lower(state, batch, key).compile(compiler_options(mesh))


def memory_in_bytes(compiled: jax.stages.Compiled) -> int | None:
    """Bytes on one device for the compiled step: state, batch and temporaries; None if unknown."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    sizes = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return sizes - analysis.alias_size_in_bytes
