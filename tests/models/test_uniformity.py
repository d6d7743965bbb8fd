"""The regulariser that keeps the features of images apart, and its value on a mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mae_jax.models.mae import MAEConfig, make_bind, uniformity
from mae_jax.runtime.sharding import ROWS, mean_over_batch, on_shards
from tests.meshes import device_mesh
from tests.reference import drawn_masks, random_batch, random_params


def features(batch=16, width=5, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, width)).astype(np.float32) + 0.5


def squared_cosine(a, b) -> float:
    dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
    return dot**2 / (sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def test_it_is_the_mean_squared_cosine_of_all_pairs_of_different_images():
    x = features(7)
    pairs = [squared_cosine(x[i], x[j]) for i in range(7) for j in range(7) if i != j]
    assert float(uniformity(x)) == pytest.approx(sum(pairs) / 42, rel=1e-6)


def test_it_is_one_for_features_that_are_alike_and_zero_for_orthogonal_ones_whatever_their_lengths():
    lengths = np.float32([[1], [-3], [0.01], [200]])
    assert float(uniformity(lengths * features(1))) == pytest.approx(1, abs=1e-6)
    assert float(uniformity(lengths * np.eye(4, dtype=np.float32))) == pytest.approx(0, abs=1e-6)


def test_of_a_single_image_it_is_zero():
    assert float(uniformity(features(1))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sizes", [(8,), (2, 4), (2, 2, 2)], ids=str)
def test_value_and_gradient_on_a_mesh_are_those_over_the_whole_batch(sizes):
    mesh, x, factor = device_mesh(*sizes), features(), np.float32(np.linspace(0.5, 1.5, 5))

    def shard(factor, rows):
        # As a training step does: the gradients of all devices, averaged.
        value, gradient = jax.value_and_grad(lambda factor: uniformity(jnp.tanh(factor * rows)))(factor)
        return mean_over_batch((value, gradient))

    specs = PartitionSpec(), ROWS
    found = jax.jit(on_shards(shard, mesh, specs, (PartitionSpec(), PartitionSpec())))(factor, x)
    expected = jax.value_and_grad(lambda factor: uniformity(jnp.tanh(factor * x)))(factor)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-6 * np.abs(expected[1]).max() + 1e-7)


def test_it_is_added_to_the_loss_with_its_weight_and_both_are_reported():
    sizes = ((8, 12), 4, 1, 8, 1, 2, 2.0, 8, 1, 2, 0.5, False)
    config, plain = MAEConfig(*sizes, uniformity=0.25, class_tokens=2), MAEConfig(*sizes, class_tokens=2)
    params, (images, _), keys = random_params(plain), random_batch(plain, 4), jax.random.split(jax.random.key(0), 4)
    loss, parts = make_bind(config)(params).training_loss(images, keys)
    reconstruction, nothing = make_bind(plain)(params).training_loss(images, keys)
    tokens = make_bind(plain)(params).encode(images, mask=drawn_masks(keys, (1, 6), 0.5))
    x = np.asarray(tokens)[:, 2:].mean(1)  # of the patches that the encoder saw
    pairs = [squared_cosine(x[i], x[j]) for i in range(4) for j in range(4) if i != j]
    assert nothing == {} and parts.keys() == {"reconstruction_loss", "uniformity"}
    assert float(parts["uniformity"]) == pytest.approx(sum(pairs) / 12, rel=1e-5)
    assert float(parts["reconstruction_loss"]) == pytest.approx(float(reconstruction), rel=1e-6)
    assert float(loss) == pytest.approx(float(reconstruction) + 0.25 * sum(pairs) / 12, rel=1e-6)
    assert math.isfinite(loss)
