"""Normalising, flipping, colours and erasing on the device, against NumPy and Pillow."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance

from mae_jax.data.augment import (
    blend,
    color_jitter,
    denormalize,
    erasing_boxes,
    grey,
    normalize,
    random_erasing,
    random_flip,
    valid_values,
)

erase = jax.jit(random_erasing)


def adjust_brightness(images, factors):
    return blend(images, 0.0, factors)


def adjust_contrast(images, factors):
    return blend(images, grey(images).mean((1, 2), keepdims=True), factors)


def adjust_saturation(images, factors):
    return blend(images, grey(images), factors)


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)


def settings(mean, std, dtype=None, value_range=None):
    return types.SimpleNamespace(mean=mean, std=std, dtype=dtype, value_range=value_range)


@pytest.mark.parametrize("mean, std", [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,), (0.25,))])
def test_normalising_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel(mean, std):
    expected = (IMAGES.astype(np.float64) / 255 - np.asarray(mean)) / np.asarray(std)
    normalized = normalize(jnp.asarray(IMAGES), settings(mean, std))
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized, expected, atol=1e-5)


def test_normalising_takes_floats_on_the_same_scale():
    floats = normalize(jnp.asarray(IMAGES, jnp.float32), settings((0.5,), (0.25,)))
    np.testing.assert_array_equal(floats, normalize(jnp.asarray(IMAGES), settings((0.5,), (0.25,))))


def test_denormalising_brings_back_the_pixels_and_does_not_clip():
    data = settings((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    back = denormalize(normalize(jnp.asarray(IMAGES), data), data)
    np.testing.assert_allclose(back, IMAGES / 255.0, atol=1e-6)
    np.testing.assert_allclose(denormalize(jnp.full((1, 1, 1, 1), 10.0), settings((0.5,), (0.25,))), 3.0)


DEEP = np.random.default_rng(0).integers(-3000, 5000, (2, 3, 4, 13))


@pytest.mark.parametrize("value_range", [None, (0, 4095), (-1.5, 2e4)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float16", "float32"])
def test_pictures_of_every_type_are_scaled_by_their_range_or_if_they_are_of_8_bits_or_not_at_all(dtype, value_range):
    pictures = DEEP.clip(*(np.iinfo(dtype).min, np.iinfo(dtype).max) if "int" in dtype else (-3000, 5000)).astype(dtype)
    mean, std = tuple(np.linspace(0.2, 0.7, 13)), tuple(np.linspace(0.1, 0.4, 13))
    data, exact = settings(mean, std, dtype, value_range), pictures.astype(np.float64)
    low, high = value_range or ((0, 255) if dtype == "uint8" else (0, 1))
    scaled = (exact.clip(low, high) if value_range else exact) / (high - low) - low / (high - low)
    normalized = normalize(jnp.asarray(pictures), data)
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized, (scaled - mean) / std, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(denormalize(normalized, data), scaled, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_values_without_data_become_0_and_are_known_and_whole_numbers_always_have_data(dtype):
    pictures = np.arange(12, dtype=dtype).reshape(1, 2, 3, 2)
    pictures[0, 1, 2, 0] = pictures[0, 0, 1, 1] = np.nan
    for value_range in (None, (3, 9)):
        normalized = np.asarray(normalize(jnp.asarray(pictures), settings((7.0,), (2.0,), dtype, value_range)))
        assert np.isfinite(normalized).all() and (normalized[np.isnan(pictures)] == 0).all()
    np.testing.assert_array_equal(valid_values(jnp.asarray(pictures)), ~np.isnan(pictures))
    assert valid_values(jnp.zeros((1, 1, 1, 1), jnp.uint16)) is None


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
    flip = jax.jit(random_flip)
    apart = jnp.concatenate([flip(keys[i : i + 1], images[i : i + 1]) for i in range(32)])
    np.testing.assert_array_equal(together, apart)


@pytest.mark.parametrize("adjust, enhancer, channels", [
    (adjust_brightness, ImageEnhance.Brightness, 3), (adjust_brightness, ImageEnhance.Brightness, 1),
    (adjust_contrast, ImageEnhance.Contrast, 3), (adjust_contrast, ImageEnhance.Contrast, 1),
    (adjust_saturation, ImageEnhance.Color, 3),
])  # fmt: skip
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.3, 1.9])
def test_colours_change_as_pillows_enhancers_change_them(adjust, enhancer, factor, channels):
    image = np.random.default_rng(1).integers(0, 256, (16, 12, channels), np.uint8)
    picture = Image.fromarray(image if channels == 3 else image[:, :, 0])
    expected = np.asarray(enhancer(picture).enhance(factor), np.float64).reshape(image.shape)
    adjusted = np.asarray(adjust(jnp.asarray(image)[None], jnp.asarray([factor])))[0]
    assert adjusted.min() >= 0 and adjusted.max() <= 255
    # Pillow rounds the grey (times 0.9 at most here) and cuts off the fraction of the result.
    np.testing.assert_allclose(adjusted, expected, atol=1.6)


def test_jitter_changes_brightness_contrast_and_saturation_in_this_order():
    # A picture in which nothing is clipped, so that the three factors can be read from the result.
    image = np.random.default_rng(0).uniform(100, 130, (10, 10, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2000)
    jittered = np.asarray(color_jitter(keys, jnp.broadcast_to(image, (2000, *image.shape)), 0.3), np.float64)
    luma = np.asarray([0.299, 0.587, 0.114])
    grey = image @ luma
    brightness = (jittered @ luma).mean((1, 2)) / grey.mean()  # neither contrast nor saturation changes the mean grey
    contrast = (jittered @ luma).std((1, 2)) / grey.std() / brightness
    chroma, before = jittered - (jittered @ luma)[..., None], image - grey[..., None]
    saturation = chroma.std((1, 2, 3)) / before.std() / brightness / contrast
    for factors in (brightness, contrast, saturation):
        uniform = (np.sort(factors) - 0.7) / 0.6
        # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the bound at 0.1 %.
        assert np.abs(uniform - np.arange(2000) / 2000).max() < 1.95 / np.sqrt(2000)
    assert np.abs(np.corrcoef([brightness, contrast, saturation]) - np.eye(3)).max() < 4 / np.sqrt(2000)
    # With clipping, the order shows.
    image = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 3), np.uint8)
    for seed in range(5):
        keys = jax.random.split(jax.random.key(seed), 1)
        one, two, three = (jnp.asarray([f]) for f in np.asarray(jax.random.uniform(keys[0], (3,), minval=0, maxval=2)))
        expected = adjust_saturation(adjust_contrast(adjust_brightness(image, one), two), three)
        np.testing.assert_allclose(color_jitter(keys, jnp.asarray(image), 1.0), expected, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_jitter_of_strength_zero_changes_nothing(channels):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, channels), np.uint8)
    jittered = color_jitter(jax.random.split(jax.random.key(0), 3), jnp.asarray(images), 0.0)
    assert jittered.dtype == jnp.float32
    np.testing.assert_array_equal(jittered, images)


@pytest.mark.parametrize("height, width", [(8, 8), (32, 48), (224, 224)])
def test_erasing_boxes_lie_in_the_picture_with_an_area_and_an_aspect_within_the_limits(height, width):
    keys = jax.random.split(jax.random.key(0), 4000)
    top, left, box_height, box_width, found = map(np.asarray, jax.jit(erasing_boxes, static_argnums=(1, 2))(
        keys, height, width))  # fmt: skip
    assert found.mean() > 0.99
    top, left, box_height, box_width = (values[found] for values in (top, left, box_height, box_width))
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()
    assert (box_height >= 1).all() and (box_height < height).all()
    assert (box_width >= 1).all() and (box_width < width).all()
    # Sides are rounded to whole pixels, by half a pixel at most.
    assert ((box_height + 0.5) * (box_width + 0.5) >= 0.02 * height * width).all()
    assert ((box_height - 0.5) * (box_width - 0.5) <= height * width / 3).all()
    assert ((box_height + 0.5) / np.maximum(box_width - 0.5, 1e-3) >= 0.3).all()
    assert ((box_height - 0.5) / (box_width + 0.5) <= 1 / 0.3).all()
    if height == 224:  # large enough for the roundings not to matter; redrawing takes a few of the largest
        area = box_height * box_width / height / width
        assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.01
        aspect = np.log(box_height / box_width)
        assert abs(aspect.mean()) < 0.05 and abs(aspect.std() - 2 * np.log(1 / 0.3) / np.sqrt(12)) < 0.05
    for start, size, side in ((top, box_height, height), (left, box_width, width)):
        assert abs((start / (side - size)).mean() - 0.5) < 0.02  # anywhere: from 0 to side - size


def test_a_picture_of_one_pixel_has_no_box_to_erase():
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_array_equal(erase(keys, jnp.full((4, 1, 1, 3), 9.0), 1.0), 9)


def test_erasing_puts_unit_noise_into_one_box_and_leaves_the_rest():
    keys = jax.random.split(jax.random.key(0), 500)
    images = jnp.full((500, 24, 32, 3), 50.0)  # no value of the noise
    erased = np.asarray(erase(keys, images, 1.0))
    changed = erased != 50
    np.testing.assert_array_equal(changed, np.broadcast_to(changed[..., :1], changed.shape))
    for i in range(500):
        ys, xs = np.nonzero(changed[i, ..., 0])
        assert len(ys) == (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
    noise = erased[changed]
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size) and abs(noise.std() - 1) < 5 / np.sqrt(2 * noise.size)
    assert len(np.unique(noise)) > 0.98 * noise.size  # each pixel and channel has its own


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_the_share_of_the_images_erased_is_the_probability(probability):
    keys = jax.random.split(jax.random.key(3), 4000)
    erased = np.asarray(erase(keys, jnp.full((4000, 8, 8, 1), 50.0), probability))
    share = (erased != 50).any((1, 2, 3)).mean()
    assert abs(share - probability) <= 4 * np.sqrt(probability * (1 - probability) / 4000)


def augment(keys, images):
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
    return random_erasing(keys[:, 0], normalize(color_jitter(keys[:, 1], images, 0.4), settings((0.5,), (0.25,))), 0.5)


def test_each_image_is_jittered_and_erased_by_its_own_key_alone_on_any_number_of_devices():
    keys = jax.random.split(jax.random.key(2), 32)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8))
    compiled = jax.jit(augment)
    together = compiled(keys, images)
    apart = jnp.concatenate([compiled(keys[i : i + 1], images[i : i + 1]) for i in range(32)])
    np.testing.assert_allclose(apart, together, atol=1e-5)
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    spread = compiled(*jax.device_put((keys, images), NamedSharding(mesh, PartitionSpec("data"))))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, together, atol=1e-5)
