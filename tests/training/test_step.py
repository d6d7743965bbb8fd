import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from configs.common import get_config
from mae_jax.models.mae import MAEConfig
from mae_jax.objectives import pretrain
from mae_jax.objectives.objective import LossDetails, Variables
from mae_jax.objectives.pretrain import make_loss_fn
from mae_jax.runtime.mesh import batch_sharding, create, put_batch
from mae_jax.training.optimizers import make_optimizer, make_schedule
from mae_jax.training.plan import compile_train_step, make_plan
from mae_jax.training.step import abstract_state, make_init, make_train_step
from tests.meshes import device_mesh
from tests.reference import random_params

BATCH, KEY = 16, 5


@functools.cache
def real_loss():
    """(initial parameters, loss function) of pre-training a tiny model, with flips."""
    config = get_config()
    config.model.update(image_size=8, patch_size=2, channels=1, normalize_targets=False)
    config.model.update(width=16, depth=2, num_heads=2, decoder_width=16, decoder_depth=1, decoder_num_heads=2)
    config.data.update(mean=(0.5,), std=(0.3,))
    assert config.data.flip
    model = MAEConfig(**config.model)
    params = random_params(model)
    return (lambda _: jax.tree.map(jnp.asarray, params)), make_loss_fn(config, model)


def images(step: int) -> dict:
    pixels = np.random.default_rng(step).integers(0, 256, (BATCH, 8, 8, 1), np.uint8)
    return {"image": pixels, "row": np.arange(BATCH, dtype=np.int32)}


def train(loss_fn, init_params, optimizer, schedule, *, devices=1, parts=1, steps=1, same_batch=False, pairs=False):
    """(last state, scalars of each step) of a few compiled steps."""
    mesh = device_mesh(devices)
    init = make_init(lambda key: Variables(init_params(key)), optimizer)
    step_fn = make_train_step(loss_fn, optimizer, schedule, mesh, parts, mixes_pairs=pairs)
    state, key = create(init, jax.random.key(0), mesh), jax.random.key(KEY)
    compiled = compile_train_step(step_fn, abstract_state(init, mesh), images(0), key, mesh)
    scalars = []
    for step in range(steps):
        batch = put_batch(images(0 if same_batch else step), batch_sharding(mesh))
        state, found = compiled(state, batch, key)
        scalars.append(jax.device_get(found))
    return state, scalars


@functools.cache
def gradient(devices: int, parts: int):
    """(gradient of the real loss, scalars of the step) as one step makes it."""
    init, loss_fn = real_loss()
    keep_gradient = optax.trace(decay=0.0)  # its state is the gradient
    state, (scalars,) = train(loss_fn, init, keep_gradient, lambda _: 0.0, devices=devices, parts=parts)
    return jax.device_get(state.opt_state.trace), scalars


def assert_same_gradient(found, expected):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        # The same sums over the batch in another order, in float32.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max() + 1e-9, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("parts", [4])
def test_the_gradient_of_a_batch_in_parts_is_that_of_the_whole_batch(parts):
    (grads, scalars), (expected, expected_scalars) = gradient(1, parts), gradient(1, 1)
    assert_same_gradient(grads, expected)
    assert scalars["loss"] == pytest.approx(expected_scalars["loss"], rel=1e-6)
    assert scalars["grad_norm"] == pytest.approx(expected_scalars["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("parts", [2])
def test_eight_devices_make_the_gradient_of_one(parts):
    (grads, scalars), (expected, expected_scalars) = gradient(8, parts), gradient(1, 1)
    assert_same_gradient(grads, expected)
    assert scalars["loss"] == pytest.approx(expected_scalars["loss"], rel=1e-6)


def test_the_reported_norm_is_that_of_the_whole_gradient():
    grads, scalars = gradient(1, 1)
    squares = sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(grads))
    assert scalars["grad_norm"] == pytest.approx(np.sqrt(squares), rel=1e-6)


@pytest.fixture(scope="module")
def eight_steps():
    """(last state, scalars of each step) of AdamW on one batch, again and again."""
    settings = get_config().optimizer
    settings.base_learning_rate = 1e-2
    schedule = make_schedule(settings, 256, 2, 10)
    init, loss_fn = real_loss()
    return train(loss_fn, init, make_optimizer(settings, schedule), schedule, steps=8, same_batch=True)


def test_training_learns_and_every_step_is_counted_and_reported_with_its_rate(eight_steps):
    state, scalars = eight_steps
    assert int(state.step) == 8
    expected = [0, 5e-3, *(1e-2 * (1 + np.cos(np.pi * i / 8)) / 2 for i in range(6))]
    np.testing.assert_allclose([s["learning_rate"] for s in scalars], expected, rtol=1e-5)
    losses = [s["loss"] for s in scalars]
    # The pixels are noise around a mean: what can be learnt in eight steps is the mean.
    assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2])


def test_the_masks_of_a_batch_change_from_step_to_step(eight_steps):
    # The first step's rate is 0: the second has the same parameters and the same images.
    _, (first, second, *_) = eight_steps
    assert abs(second["loss"] / first["loss"] - 1) > 1e-3


def zero_rows(_):
    return {"w": jnp.zeros((BATCH, 4))}


def tell_keys(params, frozen, batch, keys):
    """A loss whose gradient by row i of the parameters tells the key of the batch's row i, in numbers of 16 bits."""
    data = jax.random.key_data(keys)
    halves = jnp.concatenate([data >> 16, data & 0xFFFF], axis=1).astype(jnp.float32)
    return jnp.mean(jnp.sum(params["w"][batch["row"]] * halves, axis=1)), LossDetails()


@pytest.mark.parametrize("devices", [1, 8])
def test_each_example_of_each_step_has_a_key_of_its_own_whatever_the_devices(devices):
    keep_gradient, found = optax.trace(decay=0.0), []
    for steps in (1, 2, 3, 4):
        state, _ = train(tell_keys, zero_rows, keep_gradient, lambda _: 0.1, devices=devices, steps=steps)
        found.append(np.asarray(state.opt_state.trace["w"]) * BATCH)  # a power of two: no bit is lost
    assert len(np.unique(np.concatenate(found), axis=0)) == 4 * BATCH
    for step, halves in enumerate(found):
        keys = jax.random.key_data(jax.random.split(jax.random.fold_in(jax.random.key(KEY), step), BATCH))
        np.testing.assert_array_equal(halves, np.concatenate([keys >> 16, keys & 0xFFFF], axis=1))


def test_each_part_of_a_batch_has_the_keys_and_images_of_its_rows():
    # The loss pairs each row's pixel with its key, so that a row with another's key shows.
    def pair(params, frozen, batch, keys):
        weights = jax.vmap(jax.random.uniform)(keys)
        return jnp.mean(params["w"][0] * weights * batch["image"][:, 0, 0, 0]), LossDetails()

    _, (scalars,) = train(pair, lambda _: {"w": jnp.ones(1)}, optax.sgd(0.1), lambda _: 0.1, parts=4)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(KEY), 0), BATCH)
    expected = np.mean(jax.vmap(jax.random.uniform)(keys) * images(0)["image"][:, 0, 0, 0])
    assert scalars["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_rows_that_may_be_mixed_stay_together_in_the_parts_of_a_batch():
    def pair(params, frozen, batch, keys):
        pixel = batch["image"][:, 0, 0, 0].astype(jnp.float32)
        return jnp.mean(params["w"][0] * pixel[0::2] * pixel[1::2]), LossDetails()

    losses = []
    for parts in (1, 2, 4):
        _, (scalars,) = train(
            pair, lambda _: {"w": jnp.ones(1)}, optax.sgd(0.1), lambda _: 0.1, parts=parts, pairs=True
        )
        losses.append(float(scalars["loss"]))
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_step_is_traced_once_and_takes_the_state_it_gave(devices):
    traced = []

    def loss_fn(params, frozen, batch, keys):
        traced.append(1)
        return tell_keys(params, frozen, batch, keys)

    state, _ = train(loss_fn, zero_rows, optax.adam(0.1), lambda _: 0.1, devices=devices, steps=3)
    assert len(traced) == 1 and int(state.step) == 3


def test_the_memory_of_the_old_state_is_given_to_the_new_one():
    mesh, optimizer = device_mesh(1), optax.adam(0.1)
    init = make_init(lambda key: Variables(zero_rows(key)), optimizer)
    state, key = create(init, jax.random.key(0), mesh), jax.random.key(KEY)
    step_fn = make_train_step(tell_keys, optimizer, lambda _: 0.1, mesh)
    compiled = compile_train_step(step_fn, abstract_state(init, mesh), images(0), key, mesh)
    new, _ = compiled(state, put_batch(images(0), batch_sharding(mesh)), key)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_each_device_holds_its_share_of_the_batch_and_a_whole_copy_of_the_state():
    mesh = device_mesh(8)
    batch = put_batch(images(0), batch_sharding(mesh))
    assert [s.data.shape[0] for s in batch["image"].addressable_shards] == [BATCH // 8] * 8
    init = make_init(lambda _: Variables({"w": jnp.ones((8, 3))}), optax.adam(0.1))
    state = create(init, jax.random.key(0), mesh)
    for leaf in jax.tree.leaves(state):
        assert [s.data.shape for s in leaf.addressable_shards] == [leaf.shape] * 8


def lowered(mesh, **model) -> str:
    """The program of a step that trains the digits' model with other settings."""
    config = digits.get_config()
    config.model.update(**model)
    objective = pretrain.Pretraining(config, Path("nowhere"), mesh)
    plan = make_plan(config, objective, mesh)
    return jax.jit(plan.step_fn).lower(plan.abstract, objective.batch, jax.random.key(0)).as_text()


@pytest.mark.parametrize(("depth", "scan_unroll"), [(13, None)])
def test_a_deeper_model_has_a_program_of_the_same_size(depth, scan_unroll):
    """So that compiling takes as long: XLA sees one block, however often it runs. A CPU unrolls a few, and no more."""
    sizes = (depth, depth + 7)
    shallow, deep = (lowered(device_mesh(), depth=d, decoder_depth=d, scan_unroll=scan_unroll) for d in sizes)
    assert shallow != deep and shallow.count("\n") == deep.count("\n")


def test_a_cpu_trains_without_loops_over_few_blocks_unless_these_compute_or_gather_again():
    def loops(mesh, **model):
        return lowered(mesh, depth=2, decoder_depth=2, **model).count("stablehlo.while")

    others = loops(device_mesh(), scan_unroll=2)  # such as those that draw masks
    assert loops(device_mesh()) == others
    forward_and_backward = 2 * 2  # of encoder and decoder
    assert loops(device_mesh(), scan_unroll=1) == others + forward_and_backward
    assert loops(device_mesh(), remat=True) == others + forward_and_backward
    assert loops(device_mesh(1, 2)) == loops(device_mesh(1, 2), scan_unroll=1)
