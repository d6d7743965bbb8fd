"""Updates that are not finite and are left out, as `train.skip_nonfinite` allows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.objectives.objective import LossDetails, Variables
from mae_jax.runtime.mesh import batch_sharding, create, put_batch
from mae_jax.runtime.sharding import mean_over_batch
from mae_jax.training.plan import compile_train_step
from mae_jax.training.step import abstract_state, make_init, make_train_step
from tests.meshes import device_mesh

RATE = 0.1


def loss_fn(params, frozen, batch, keys):
    statistics = {"mean": mean_over_batch(jnp.mean(batch["x"]))}
    return jnp.mean(params["w"] * batch["x"]), LossDetails(statistics=statistics)


def train(batches, allowed, devices=1, rate=RATE, change=lambda state: state):
    """(the host's state before the first and after each step, scalars of each step)."""
    mesh, key = device_mesh(devices), jax.random.key(0)
    optimizer = optax.adam(optax.linear_schedule(rate, 0.0, 10))
    variables = Variables({"w": jnp.ones(())}, statistics={"mean": jnp.zeros(())})
    init = make_init(lambda _: variables, optimizer, keep_average=True)
    step_fn = make_train_step(
        loss_fn, optimizer, optax.linear_schedule(RATE, 0.0, 10), mesh, ema_decay=0.9, skip_nonfinite=allowed
    )
    abstract = abstract_state(init, mesh)
    compiled = compile_train_step(step_fn, abstract, {"x": jax.ShapeDtypeStruct((8,), jnp.float32)}, key, mesh)
    state, scalars = change(create(init, key, mesh)), []
    states = [jax.tree.map(np.array, state)]
    for value in batches:
        batch = put_batch({"x": np.full(8, value, np.float32)}, batch_sharding(mesh))
        state, found = compiled(state, batch, key)
        states.append(jax.tree.map(np.array, state))
        scalars.append(jax.device_get(found))
    return states, scalars


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("devices", [1, 8])
def test_a_bad_update_is_left_out_counted_and_leaves_no_trace(bad, devices):
    states, scalars = train([1.0, bad, 2.0], allowed=1, devices=devices)
    expected, _ = train([1.0, 2.0], allowed=0, devices=devices)
    assert [int(state.step) for state in states] == [0, 1, 2, 3]
    assert [int(state.skipped) for state in states] == [0, 0, 1, 1]
    assert [int(s["skipped"]) for s in scalars] == [0, 1, 1]
    jax.tree.map(np.testing.assert_array_equal, states[2]._replace(step=1, skipped=0), states[1]._replace(step=1))
    jax.tree.map(np.testing.assert_array_equal, states[3]._replace(step=2, skipped=0), expected[2]._replace(step=2))


def test_the_rate_that_is_reported_is_the_one_that_is_used():
    _, scalars = train([1.0, np.nan, 1.0], allowed=3)
    np.testing.assert_allclose([s["learning_rate"] for s in scalars], [0.1, 0.09, 0.09], rtol=1e-6)


def test_no_more_updates_are_left_out_than_allowed():
    states, _ = train([np.nan, 1.0, np.nan, np.nan], allowed=2)
    assert [int(state.skipped) for state in states] == [0, 1, 1, 2, 2]
    assert np.isnan(states[-1].params["w"]) and not np.isnan(states[-2].params["w"])


HUGE = 3e38  # the largest float32 is 3.4e38


@pytest.mark.parametrize("devices", [1, 8])
def test_an_update_that_leaves_something_infinite_behind_is_left_out_though_its_loss_and_gradient_are_finite(devices):
    states, scalars = train([0.1, 0.1, 0.1], allowed=2, devices=devices, rate=HUGE)
    assert [bool(s["finite"]) for s in scalars] == [True, False, False]
    assert all(np.isfinite(s["loss"]) and np.isfinite(s["grad_norm"]) for s in scalars)
    assert [int(state.skipped) for state in states] == [0, 0, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, states[3]._replace(step=1, skipped=0), states[1])


@pytest.mark.parametrize("part", ["opt_state", "statistics", "average"])
def test_everything_that_is_kept_is_looked_at_also_where_nothing_is_left_out(part):
    def spoil(state):
        infinite = lambda x: jnp.full_like(x, jnp.inf) if x.dtype == jnp.float32 else x  # noqa: E731
        return state._replace(**{part: jax.tree.map(infinite, getattr(state, part))})

    states, scalars = train([1.0], allowed=0, change=spoil)
    assert np.isfinite(scalars[0]["loss"]) and np.isfinite(scalars[0]["grad_norm"]) and not scalars[0]["finite"]
