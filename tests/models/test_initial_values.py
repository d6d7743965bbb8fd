"""The parameters that training starts from: how many, and how they are drawn."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.config import SIZES
from mae_jax.models.mae import MAEConfig, init_params
from mae_jax.models.parameters import count_parameters
from tests.reference import leaves_by_block


@pytest.fixture(scope="module")
def initial():
    """The initial parameters of a model wide enough for statistics, by name; blocks not taken apart."""
    config = MAEConfig(64, 16, 3, 256, 3, 4, 4.0, 128, 2, 4)
    leaves = jax.tree_util.tree_leaves_with_path(jax.jit(functools.partial(init_params, config))(jax.random.key(0)))
    return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}


def test_every_kernel_starts_uniform_within_the_xavier_bound_and_that_of_qkv_is_the_fused_matrix(initial):
    kernels = {name: value for name, value in initial.items() if name.endswith("kernel")}
    assert len(kernels) == 11
    assert kernels["encoder/blocks/attention/qkv/kernel"].shape == (3, 256, 3, 256)
    for name, value in kernels.items():
        inputs, outputs = value.shape[-2:]
        if "qkv" in name:  # one matrix [D, 3D], kept as [D, 3, D]
            inputs, outputs = value.shape[-1], 3 * value.shape[-1]
        bound = math.sqrt(6 / (inputs + outputs))
        # 10^4 to 10^6 values: the largest lies within 1 % of the bound, the deviation within 2 % of the uniform law's.
        assert 0.99 * bound < np.abs(value).max() <= bound, name
        assert abs(value.std() / (bound / math.sqrt(3)) - 1) < 0.02, name
        assert abs(value.mean()) < 0.02 * bound, name


def test_the_patch_embeddings_bias_starts_uniform_as_a_convolutions_and_all_others_zero(initial):
    for name, value in initial.items():
        if name == "encoder/patch_embed/bias":
            bound = 1 / math.sqrt(16 * 16 * 3)
            assert 0.95 * bound < np.abs(value).max() <= bound
            assert abs(value.std() / (bound / math.sqrt(3)) - 1) < 0.1 and abs(value.mean()) < 0.1 * bound
        elif name.endswith("bias"):
            assert not value.any(), name


def test_the_tokens_start_normal_with_deviation_0_02_and_norms_at_one(initial):
    for name, value in initial.items():
        if name.endswith("token"):
            # The deviation of 128 values scatters by 6 %; a third lies beyond one deviation.
            assert abs(value.std() / 0.02 - 1) < 0.2 and abs(value.mean()) < 0.006, name
            assert 0.2 < np.mean(np.abs(value) > 0.02) < 0.45, name
        elif name.endswith("scale"):
            assert (value == 1).all(), name


def test_every_block_and_every_kernel_starts_with_values_of_its_own(initial):
    rows = [row[:64] for name, v in initial.items() if name.endswith("kernel") for row in v.reshape(-1, v.shape[-1])]
    assert len(np.unique(np.array(rows), axis=0)) == len(rows)


def test_the_same_key_makes_the_same_parameters_and_another_key_others():
    init = jax.jit(functools.partial(init_params, MAEConfig(8, 4, 1, 8, 2, 2, 2.0, 8, 1, 2)))
    first, again, other = (leaves_by_block(init(jax.random.key(seed))) for seed in (0, 0, 1))
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
        if name.endswith(("kernel", "token")):
            assert not np.array_equal(value, other[name]), name


def test_position_tables_are_no_parameters(initial):
    assert {name.rsplit("/", 1)[-1] for name in initial} == {"kernel", "bias", "scale", "class_token", "mask_token"}
    assert {name for name in initial if name.endswith("token")} == {"encoder/class_token", "decoder/mask_token"}


# The trainable parameters of the released models: all of theirs but the two position tables.
@pytest.mark.parametrize(
    ("size", "trainable", "encoder"),
    [
        ("base", 111_655_680, 85_798_656 - 197 * 768),
        ("large", 329_239_296, 303_301_632 - 197 * 1024),
        ("huge", 656_613_964, 630_764_800 - 257 * 1280),
    ],
)
def test_the_named_sizes_have_the_parameters_of_the_released_models(size, trainable, encoder):
    shapes = jax.eval_shape(lambda: init_params(MAEConfig(**SIZES[size]), jax.random.key(0)))
    assert count_parameters(shapes) == trainable
    assert count_parameters(shapes["encoder"]) == encoder
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
