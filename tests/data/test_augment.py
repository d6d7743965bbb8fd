"""Normalising and flipping on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.data.augment import denormalize, normalize, random_flip

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)


@pytest.mark.parametrize("mean, std", [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,), (0.25,))])
def test_normalising_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel(mean, std):
    expected = (IMAGES.astype(np.float64) / 255 - np.asarray(mean)) / np.asarray(std)
    normalized = normalize(jnp.asarray(IMAGES), mean, std)
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized, expected, atol=1e-5)


def test_denormalising_brings_back_the_pixels_and_does_not_clip():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    back = denormalize(normalize(jnp.asarray(IMAGES), mean, std), mean, std)
    np.testing.assert_allclose(back, IMAGES / 255.0, atol=1e-6)
    np.testing.assert_allclose(denormalize(jnp.full((1, 1, 1, 1), 10.0), (0.5,), (0.25,)), 3.0)


def test_a_flip_mirrors_left_and_right_and_nothing_else():
    keys = jax.random.split(jax.random.key(0), 64)
    images = np.arange(64 * 2 * 3 * 1, dtype=np.uint8).reshape(64, 2, 3, 1)
    flipped = np.asarray(random_flip(keys, jnp.asarray(images)))
    mirrored = [np.array_equal(after, before[:, ::-1]) for before, after in zip(images, flipped, strict=True)]
    kept = [np.array_equal(after, before) for before, after in zip(images, flipped, strict=True)]
    assert flipped.dtype == np.uint8
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))


def test_half_of_the_images_are_flipped():
    keys = jax.random.split(jax.random.key(1), 4000)
    images = jnp.broadcast_to(jnp.arange(2)[None, None, :, None], (4000, 1, 2, 1))
    share = float(random_flip(keys, images)[:, 0, 0, 0].mean())
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(4000)  # four standard deviations


def test_each_image_is_flipped_by_its_own_key_alone():
    keys = jax.random.split(jax.random.key(2), 32)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (32, 4, 4, 3), np.uint8))
    together = random_flip(keys, images)
    apart = jnp.concatenate([random_flip(keys[i : i + 1], images[i : i + 1]) for i in range(32)])
    np.testing.assert_array_equal(together, apart)
