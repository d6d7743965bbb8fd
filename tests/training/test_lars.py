import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.common import get_config
from mae_jax.training.optimizers import decays, make_optimizer, make_schedule


def lars_settings(**changes):
    settings = get_config().optimizer
    settings.update(name="lars", **changes)
    return settings


def numpy_lars(params, grads, rates, *, decay, trust, momentum):
    """Values of {"kernel", "bias"} after steps with these gradients and rates, in float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    mu = {name: np.zeros_like(value) for name, value in params.items()}
    for step, rate in enumerate(rates):
        for name, p in params.items():
            g = grads[step][name].astype(np.float64)
            if name == "kernel":
                g = g + decay * p
                norms = np.sqrt(np.sum(p**2)), np.sqrt(np.sum(g**2))
                g = g * (trust * norms[0] / norms[1] if min(norms) > 0 else 1.0)
            mu[name] = momentum * mu[name] + g
            params[name] = p - rate * mu[name]
    return params


@pytest.mark.parametrize("start", ["random", "zero"])
def test_lars_multiplies_the_momentum_by_the_rate_of_the_step(start):
    settings = lars_settings(base_learning_rate=6.4, weight_decay=0.1, trust_coefficient=0.02)
    schedule = make_schedule(settings, 256, 3, 10)
    rates = [6.4 * i / 3 for i in range(3)] + [6.4 * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(7)]
    rng = np.random.default_rng(0)

    def draw():
        return {
            "kernel": rng.standard_normal((5, 3)).astype(np.float32),
            "bias": rng.standard_normal(3).astype(np.float32),
        }

    first, grads = draw(), [draw() for _ in range(10)]
    if start == "zero":  # a norm of 0 gives no trust ratio; neither does a gradient of 0
        first["kernel"][:] = 0
        grads[0]["kernel"][:] = 0
    expected = numpy_lars(first, grads, rates, decay=0.1, trust=0.02, momentum=0.9)

    def run(optimizer):
        params = {"head": jax.tree.map(jnp.asarray, first)}
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for grad in grads:
            updates, state = update({"head": grad}, state, params)
            params = optax.apply_updates(params, updates)
        return params["head"]

    found = run(make_optimizer(settings, schedule))
    for name in expected:
        # Ten float32 roundings.
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    mask = lambda params: decays(params, tokens=True)  # noqa: E731
    other = run(optax.lars(schedule, 0.1, mask, 0.02, trust_ratio_mask=mask, momentum=0.9))
    assert np.max(np.abs(other["kernel"] - expected["kernel"])) > 1e-2  # the rate inside the momentum


def test_lars_moves_a_probe_that_begins_near_zero_by_its_own_measure():
    # One step at rate 1: the update's norm is the trust coefficient times the kernel's norm, whatever the gradient's.
    settings = lars_settings(weight_decay=0.0)
    optimizer = make_optimizer(settings, lambda _: 1.0)
    rng = np.random.default_rng(0)
    for size in (1e-6, 1e6):
        params = {"head": {"kernel": jnp.asarray(0.01 * rng.standard_normal((20, 5)), jnp.float32)}}
        grads = {"head": {"kernel": jnp.asarray(size * rng.standard_normal((20, 5)), jnp.float32)}}
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        ratio = np.linalg.norm(updates["head"]["kernel"]) / np.linalg.norm(params["head"]["kernel"])
        assert ratio == pytest.approx(0.001, rel=1e-5)
