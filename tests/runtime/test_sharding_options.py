"""The model's options on meshes of eight devices: the numbers are those of one device, and what splits is split."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from mae_jax.models.mae import MAEConfig, init_params, make_bind, split_fixed
from mae_jax.models.parameters import join
from mae_jax.objectives.objective import LossDetails, Variables
from mae_jax.runtime.mesh import batch_sharding, create, parameter_specs, put_batch
from mae_jax.training.plan import compile_train_step
from mae_jax.training.step import abstract_state, make_init, make_train_step
from tests.meshes import device_mesh

BATCH = 16
# Heads of 8 and 4 values: of few values, a head's norm is steep where they are alike.
SIZES = dict(
    image_size=(8, 16), patch_size=4, channels=3, width=64, depth=1, num_heads=8, mlp_ratio=1.0, decoder_width=32,
    decoder_depth=1, decoder_num_heads=8, mask_ratio=0.5, normalize_targets=False, class_tokens=3, registers=2,
    qk_norm=True, masks_per_image=2, uniformity=0.2,
)  # fmt: skip
MODELS = {
    "cross": MAEConfig(**SIZES, decoder_attention="cross", prediction_ratio=0.25, pca_targets=9),
    "mask tokens": MAEConfig(**SIZES, encoder_mask_tokens=True, loss_patches="all", mask_sampling="block"),
}


@functools.cache
def one_step(name, sizes, parts=1):
    """(scalars, the state after one step of SGD with rate 1) on a mesh, fetched; and the shapes on a device."""
    config, mesh, optimizer, key = MODELS[name], device_mesh(*sizes), optax.sgd(1.0), jax.random.key(1)
    images = np.random.default_rng(0).normal(size=(BATCH, *config.image_size, 3)).astype(np.float32)

    def loss_fn(params, frozen, batch, keys):
        loss, scalars = make_bind(config)(join(params, frozen)).training_loss(batch["image"], keys)
        return loss, LossDetails(scalars)

    init = make_init(lambda key: Variables(*split_fixed(config, init_params(config, key))), optimizer)
    step_fn = make_train_step(loss_fn, optimizer, lambda _: 1.0, mesh, parts)
    batch = {"image": jax.ShapeDtypeStruct(images.shape, images.dtype)}
    compiled = compile_train_step(step_fn, abstract_state(init, mesh), batch, key, mesh)
    state = create(init, jax.random.key(0), mesh)
    local = {path: leaf.addressable_shards[0].data.shape for path, leaf in flatten_dict(state.params).items()}
    before = jax.device_get(state.params)
    state, scalars = compiled(state, put_batch({"image": images}, batch_sharding(mesh)), key)
    gradients = jax.tree.map(np.subtract, before, jax.device_get(state.params))
    return jax.device_get(scalars), gradients, jax.device_get(state.frozen), local


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("cross", (2, 2, 2)),
        pytest.param("mask tokens", (2, 2, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_with_every_option_has_the_loss_and_gradients_of_one_device(name, sizes):
    scalars, gradients, frozen, _ = one_step(name, sizes)
    expected, expected_gradients, expected_frozen, _ = one_step(name, (1,))
    assert scalars.keys() == expected.keys() >= {"loss", "uniformity", "reconstruction_loss"}
    for scalar, value in expected.items():  # float32, added up in another order
        assert scalars[scalar] == pytest.approx(value, rel=1e-5), scalar
    for path, value in flatten_dict(expected_gradients).items():
        found = flatten_dict(gradients)[path]
        # Before and after the step parameters have 6e-8 of values around 1, which the difference keeps.
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-5 * np.abs(value).max() + 3e-7, err_msg=str(path))
    jax.tree.map(np.testing.assert_array_equal, frozen, expected_frozen)


@pytest.mark.slow
def test_every_parameter_of_the_options_learns():
    for name in MODELS:
        for path, gradient in flatten_dict(one_step(name, (1,))[1]).items():
            assert np.abs(gradient).max() > 0, path


def test_queries_and_the_memorys_keys_and_values_are_split_by_heads_and_inputs():
    local, whole = one_step("cross", (2, 2, 2))[3], one_step("cross", (1,))[3]
    attention = ("decoder", "blocks", "attention")
    assert whole[*attention, "q", "kernel"] == (1, 32, 32) and local[*attention, "q", "kernel"] == (1, 16, 16)
    assert whole[*attention, "q", "bias"] == (1, 32) and local[*attention, "q", "bias"] == (1, 16)
    assert whole[*attention, "kv", "kernel"] == (1, 64, 2, 32) and local[*attention, "kv", "kernel"] == (1, 32, 2, 16)
    assert whole[*attention, "kv", "bias"] == (1, 2, 32) and local[*attention, "kv", "bias"] == (1, 2, 16)
    for path, shape in whole.items():  # matrices in four parts (over fsdp and, in blocks, tensor), the basis nowhere
        if path[-1] == "kernel":
            assert np.prod(shape) == np.prod(local[path]) * (4 if "blocks" in path else 2), path
        elif path[-1] in ("class_token", "registers", "mask_token", "scale"):
            assert shape == local[path], path
    assert not any("basis" in path for path in whole)
    basis = one_step("cross", (2, 2, 2))[2]["decoder"]["basis"]
    assert all(
        spec == PartitionSpec(*[None] * leaf.ndim)
        for leaf, spec in zip(
            jax.tree.leaves(basis), jax.tree.leaves(parameter_specs({"decoder": {"basis": basis}})), strict=True
        )
    )


@pytest.mark.slow
def test_a_batch_in_parts_has_the_regulariser_of_each_part_on_every_mesh():
    whole, halves = one_step("cross", (2, 2, 2))[0], one_step("cross", (2, 2, 2), parts=2)[0]
    expected = one_step("cross", (1,), parts=2)[0]
    assert halves["reconstruction_loss"] == pytest.approx(whole["reconstruction_loss"], rel=1e-5)
    assert halves["uniformity"] == pytest.approx(expected["uniformity"], rel=1e-5)
    assert abs(halves["uniformity"] / whole["uniformity"] - 1) > 1e-6  # other pairs: those within a part
