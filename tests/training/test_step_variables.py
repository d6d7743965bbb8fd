"""What a step does besides the update: running statistics, the moving average, frozen parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mae_jax.models.classifier import ClassifierConfig, init_classifier, make_bind_classifier, split_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.models.parameters import join
from mae_jax.objectives.objective import LossDetails, Variables
from mae_jax.runtime.mesh import batch_sharding, create, put_batch
from mae_jax.training.plan import compile_train_step
from mae_jax.training.step import TrainState, abstract_state, make_init, make_train_step, start_from
from tests.meshes import device_mesh
from tests.reference import random_like

BATCH, WIDTH, CLASSES, RATE = 16, 8, 3, 0.1
MODEL = ClassifierConfig(MAEConfig(4, 2, 1, WIDTH, 2, 2, 2.0, 8, 1, 2), CLASSES, "class", 0, True)
BIND = make_bind_classifier(MODEL)


@functools.cache
def start() -> Variables:
    shapes, statistics = jax.eval_shape(lambda: init_classifier(MODEL, jax.random.key(0)))
    statistics = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), statistics)
    statistics["head"]["batch_norm"]["variance"] += 1
    return Variables(*split_classifier(MODEL, random_like(shapes)), statistics)


def batch(step: int) -> dict:
    """Features whose mean and scale move from step to step, as arrays of the host."""
    rng = np.random.default_rng(step)
    features = (step + 1) * rng.standard_normal((BATCH, WIDTH)) + rng.standard_normal(WIDTH)
    return {"feature": features.astype(np.float32), "label": rng.integers(0, CLASSES, BATCH, np.int32)}


def loss_fn(params, frozen, batch, keys):
    logits, statistics = BIND(join(frozen, params, start().statistics)).classify(batch["feature"], training=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return loss, LossDetails(statistics=statistics)


def train(*, devices=1, parts=1, steps=3, optimizer=None, ema_decay=None, values=None) -> list[TrainState]:
    """The states (on the host) before the first and after each step."""
    mesh = device_mesh(devices)
    optimizer = optimizer or optax.sgd(RATE)
    init = make_init(lambda key: jax.tree.map(jnp.asarray, start()), optimizer, keep_average=ema_decay is not None)
    step_fn = make_train_step(loss_fn, optimizer, lambda _: RATE, mesh, parts, ema_decay)
    state, key = create(init, jax.random.key(0), mesh), jax.random.key(1)
    compiled = compile_train_step(step_fn, abstract_state(init, mesh), batch(0), key, mesh)
    if values is not None:
        state = start_from(state, values)
    states = [jax.tree.map(np.array, state)]
    for step in range(steps):
        state, _ = compiled(state, put_batch(batch(step), batch_sharding(mesh)), key)
        states.append(jax.tree.map(np.array, state))
    return states


def running(state: TrainState) -> dict[str, np.ndarray]:
    return state.statistics["head"]["batch_norm"]


@pytest.fixture(scope="module")
def torch_head():
    """(BatchNorm, linear layer) of PyTorch after three steps on the whole batches."""
    torch = pytest.importorskip("torch")
    norm = torch.nn.BatchNorm1d(WIDTH, affine=False, eps=1e-6, momentum=0.1)
    linear = torch.nn.Linear(WIDTH, CLASSES)
    begin = start().params["head"]["linear"]
    linear.load_state_dict({"weight": torch.tensor(begin["kernel"].T), "bias": torch.tensor(begin["bias"])})
    optimizer = torch.optim.SGD(linear.parameters(), lr=RATE)
    for step in range(3):
        x, label = torch.tensor(batch(step)["feature"]), torch.tensor(batch(step)["label"]).long()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(linear(norm(x)), label).backward()
        optimizer.step()
    return norm.eval(), linear


@pytest.mark.parametrize("devices", [1, 8])
def test_batch_norm_learns_as_pytorchs_on_the_whole_batch_whatever_the_devices(torch_head, devices):
    norm, linear = torch_head
    state = train(devices=devices)[-1]
    # A few float32 roundings.
    np.testing.assert_allclose(running(state)["mean"], norm.running_mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(running(state)["variance"], norm.running_var, rtol=1e-5)
    np.testing.assert_allclose(state.params["head"]["linear"]["kernel"].T, linear.weight.detach(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(state.params["head"]["linear"]["bias"], linear.bias.detach(), rtol=0, atol=1e-6)


def test_batch_norm_evaluates_by_the_running_statistics_as_pytorchs(torch_head):
    import torch

    norm, linear = torch_head
    with torch.no_grad():
        expected = linear(norm(torch.tensor(batch(7)["feature"]))).numpy()
    logits, statistics = BIND(train()[-1].variables()).classify(batch(7)["feature"])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert not jax.tree.leaves(statistics)


@pytest.mark.parametrize("devices", [1, 8])
def test_statistics_of_parts_are_averaged_and_enter_the_running_ones_once_a_step(devices):
    state = train(devices=devices, parts=2, steps=2)[-1]
    mean, variance = np.zeros(WIDTH), np.ones(WIDTH)
    for step in range(2):
        rows = batch(step)["feature"].astype(np.float64)
        halves = [rows[part::2] for part in range(2)]  # the parts take them in turn
        mean = 0.9 * mean + 0.1 * np.mean([half.mean(0) for half in halves], axis=0)
        variance = 0.9 * variance + 0.1 * np.mean([half.var(0, ddof=1) for half in halves], axis=0)
    np.testing.assert_allclose(running(state)["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(running(state)["variance"], variance, rtol=1e-5)


def kernel(tree: dict) -> np.ndarray:
    return tree["head"]["linear"]["kernel"]


def test_the_average_follows_the_parameters_and_is_what_the_model_gets():
    states = train(steps=4, ema_decay=0.8)
    expected = kernel(states[0].params).astype(np.float64)
    for state in states[1:]:
        expected = 0.8 * expected + 0.2 * kernel(state.params)
        np.testing.assert_allclose(kernel(state.average), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(kernel(states[-1].params) - expected).max() > 1e-2
    np.testing.assert_array_equal(kernel(states[-1].variables()), kernel(states[-1].average))
    # All else is the state's own.
    variables = states[-1].variables()
    np.testing.assert_array_equal(variables["encoder"]["positions"], states[-1].frozen["encoder"]["positions"])
    np.testing.assert_array_equal(variables["head"]["batch_norm"]["mean"], running(states[-1])["mean"])


def test_without_a_moving_average_the_model_gets_the_parameters():
    state = train(steps=1)[-1]
    assert state.average == {}
    np.testing.assert_array_equal(kernel(state.variables()), kernel(state.params))


def test_a_moving_average_does_not_change_the_training():
    for plain, averaged in zip(train(), train(ema_decay=0.9), strict=True):
        np.testing.assert_array_equal(kernel(plain.params), kernel(averaged.params))


def test_frozen_parameters_keep_every_bit_whatever_decay_and_momentum_do():
    first, *_, last = train(optimizer=optax.adamw(0.1, weight_decay=0.5))
    assert np.abs(kernel(last.params) - kernel(first.params)).max() > 1e-2
    assert len(jax.tree.leaves(first.frozen)) > 10
    jax.tree.map(np.testing.assert_array_equal, last.frozen, first.frozen)
    jax.tree.map(np.testing.assert_array_equal, first.frozen, start().frozen)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_that_begins_with_given_values_has_them_in_parameters_and_average(devices):
    rng = np.random.default_rng(5)
    params, frozen, statistics = jax.tree.map(lambda leaf: rng.uniform(1, 2, leaf.shape).astype(np.float32), start())
    given = {"head": {"linear": {"kernel": params["head"]["linear"]["kernel"]}}}  # the bias stays
    before = jax.tree.map(np.copy, (given, frozen, statistics))
    first, second, *_ = train(devices=devices, ema_decay=0.5, values=Variables(given, frozen, statistics))
    np.testing.assert_array_equal(kernel(first.params), kernel(given))
    np.testing.assert_array_equal(kernel(first.average), kernel(given))
    np.testing.assert_array_equal(first.params["head"]["linear"]["bias"], start().params["head"]["linear"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, (first.frozen, first.statistics), (frozen, statistics))
    # The steps, which reuse the state's memory, leave the caller's arrays and the average of the first step alone.
    jax.tree.map(np.testing.assert_array_equal, (given, frozen, statistics), before)
    expected = (kernel(first.params) + kernel(second.params)) / 2
    np.testing.assert_allclose(kernel(second.average), expected, rtol=1e-6)
