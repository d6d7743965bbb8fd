"""The training state, and the step: one compiled call from a state and a batch to the next state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, PartitionSpec

from mae_jax.models.parameters import join
from mae_jax.objectives.objective import LossFn, Variables
from mae_jax.runtime.mesh import BATCH_AXES, parameter_shardings, parameter_specs, put
from mae_jax.runtime.sharding import ROWS, axes_of, batch_devices, mean_over_batch, on_shards, vary, varying

STATISTICS_MOMENTUM = 0.1  # weight of a new batch in the running statistics of BatchNorm


class TrainState(NamedTuple):
    """The content of a checkpoint. There is no random state: keys derive from the seed and the step."""

    step: jax.Array  # int32 scalar: steps done
    params: dict[str, Any]  # trained parameters: nested dict of float32 arrays
    opt_state: optax.OptState
    frozen: dict[str, Any] = {}  # frozen parameters
    statistics: dict[str, Any] = {}  # running statistics of BatchNorm
    average: dict[str, Any] = {}  # moving average of `params`, if one is kept
    skipped: jax.Array | int = 0  # int32 scalar: updates skipped because they were not finite

    def variables(self) -> dict[str, Any]:
        """All of the model's variables in one nested dict, with the moving average of `params` if there is one."""
        return join(self.frozen, self.average or self.params, self.statistics)


StateInit = Callable[[jax.Array], TrainState]  # key -> the state at step 0

# (state, batch, the run's key) -> (state, scalars)
TrainStep = Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict]]


def make_init(
    init_variables: Callable[[jax.Array], Variables],
    optimizer: optax.GradientTransformation,
    keep_average: bool = False,
) -> StateInit:
    def init(key: jax.Array) -> TrainState:
        params, frozen, statistics = init_variables(key)
        average = jax.tree.map(jnp.copy, params) if keep_average else {}
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(params), frozen, statistics, average, jnp.copy(zero))

    return init


def abstract_state(init: StateInit, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and layouts of the state that `init` creates."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = parameter_shardings(mesh, shapes)
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)


def start_from(state: TrainState, values: Variables) -> TrainState:
    """Replaces the parameters and statistics of a state that `values` contains."""

    def replace(tree: dict, new: dict) -> dict:
        flat = flatten_dict(tree)
        return unflatten_dict(flat | {path: put(x, flat[path].sharding) for path, x in flatten_dict(new).items()})

    replaced = {name: replace(getattr(state, name), new) for name, new in values._asdict().items()}
    return state._replace(**replaced, average=replace(state.average, values.params) if state.average else {})


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

    Example b of step s has the key split(fold_in(key, s), B)[b]. The scalar `finite`: the new state is finite, whatever
    the loss. `loss_fn` gets a device's rows of a part of a batch; if it mixes pairs, rows 2i and 2i + 1 stay together.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if accumulate_steps > 1:
        grad_fn = _accumulated(grad_fn, accumulate_steps, 2 if mixes_pairs else 1)

    def train_step(state: TrainState, batch: dict, key: jax.Array) -> tuple[TrainState, dict]:
        size = len(jax.tree.leaves(batch)[0])
        keys = jax.random.split(jax.random.fold_in(key, state.step), size)
        specs = parameter_specs(state.params)
        (loss, details), grads = on_shards(
            functools.partial(_mean_gradients, grad_fn, specs),
            mesh,
            in_specs=(specs, parameter_specs(state.frozen), ROWS, ROWS),
            out_specs=(PartitionSpec(), specs),
        )(state.params, state.frozen, batch, keys)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        statistics = optax.incremental_update(details.statistics, state.statistics, STATISTICS_MOMENTUM)
        average = optax.incremental_update(params, state.average, 1 - ema_decay) if state.average else {}
        all_finite = jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), (params, opt_state, statistics, average))
        scalars = {
            "loss": loss,
            # Without the barrier, XLA stores the squares to share them with AdamW, which is slower.
            "grad_norm": optax.tree.norm(jax.lax.optimization_barrier(grads)),
            # The optimizer does not count skipped updates.
            "learning_rate": schedule(state.step - state.skipped),
            **details.scalars,
            "finite": jax.tree.reduce(jnp.logical_and, all_finite),
        }
        new = TrainState(state.step + 1, params, opt_state, state.frozen, statistics, average, state.skipped)
        if skip_nonfinite:
            finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(scalars["grad_norm"]) & scalars["finite"]
            skip = ~finite & (state.skipped < skip_nonfinite)
            kept = jax.tree.map(lambda old, new: jnp.where(skip, old, new), state, new)
            new = kept._replace(step=new.step, skipped=state.skipped + skip)
            scalars["skipped"] = new.skipped
        return new, scalars

    return train_step


def _mean_gradients(grad_fn, specs: dict, params: dict, frozen: dict, batch: dict, keys: jax.Array):
    """On shards: ((loss, details), gradients), means over the global batch; gradients are sharded like parameters.

    Gradients are summed over data once, after all parts. Those of sharded parameters were already summed over fsdp in
    the backward pass, since a device has no room for full ones.
    """

    def mean(gradient, spec):
        axes = axes_of(("data",) if "fsdp" in spec else BATCH_AXES)
        return (jax.lax.psum(gradient, axes) if axes else gradient) / batch_devices()

    values, grads = grad_fn(params, frozen, batch, keys)
    return mean_over_batch(values), jax.tree.map(mean, grads, specs)


def _accumulated(grad_fn, count: int, run: int):
    """The mean of grad_fn over `count` parts of a device's rows, of which `run` stay together."""

    def cut(x):  # parts take rows in turn, so each part has the same rows on any number of devices
        runs = x.reshape(len(x) // (run * count), count, run, *x.shape[1:])
        return jnp.moveaxis(runs, 1, 0).reshape(count, len(x) // count, *x.shape[1:])

    def mean(params: dict, frozen: dict, *rows):
        def add_part(total, part):
            return jax.tree.map(jnp.add, total, grad_fn(params, frozen, *part)), None

        parts = jax.tree.map(cut, rows)
        shapes = jax.eval_shape(grad_fn, params, frozen, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: vary(jnp.zeros(s.shape, s.dtype), varying(s)), shapes)
        total, _ = jax.lax.scan(add_part, zeros, parts)
        return jax.tree.map(lambda x: x / count, total)

    return mean
