"""Augmentation of whole batches on the device, inside the compiled step: flips, colours, erasing, mixing.

Each example's randomness comes from its own typed JAX key of keys [b], so it is the same on any number of devices. Use
a key for one function only: split it for several.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.arrays import LUMA

ERASED_AREA = (0.02, 1 / 3)  # share of the picture
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
ERASING_TRIES = 10


def augment(data: ConfigDict, keys: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All that the settings ask for: images [b, h, w, c] of `data.dtype` become normalised; targets: float [b, k]."""
    flip_keys, color_keys, erase_keys, mix_keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 4))(keys), 1, 0)
    images = random_flip(flip_keys, images) if data.flip else images
    images = color_jitter(color_keys, images, data.color_jitter) if data.color_jitter else images
    images = normalize(images, data)
    images = random_erasing(erase_keys, images, data.erasing) if data.erasing else images
    return mix(data, mix_keys, images, targets)


def augmentations(data: ConfigDict, *, of_classifier: bool) -> list[str]:
    """Names of the random changes to a training picture, on the host or the device; empty: it is always the same."""
    names = [f"random crop {data.crop_scale}"] if data.crop_rule != "centre" else []
    names += ["flip"] if data.flip else []
    names += ["RandAugment"] if data.augmentation == "rand_augment" else []
    others = ("color_jitter", "erasing", "mixup", "cutmix") if of_classifier else ("color_jitter",)
    return names + [f"{name} {data[name]}" for name in others if data[name]]


def normalize(images: jax.Array, data: Any) -> jax.Array:
    """Images [b, h, w, c] of `data.dtype` (or floats of its values) as float32 (x - data.mean) / data.std.

    x lies on [0, 1], where 0 and 1 are the ends of `data.value_range`, beyond which values are clipped, or 0 and 255 of
    uint8. Of other types without a range it is the value itself. Mean and std have one value, or one for each channel.
    NaN, which stands for no data, becomes 0. `data` are settings, or a `Processor`.
    """
    images, mean, std = (jnp.asarray(values, jnp.float32) for values in (images, data.mean, data.std))
    low, high = unit_range(data)
    if data.value_range is not None:
        images = (jnp.clip(images, low, high) - low) / (high - low)
    elif high != 1:
        images = images / high
    images = (images - mean) / std
    return jnp.where(jnp.isnan(images), 0, images) if jnp.issubdtype(dtype_of(data), jnp.floating) else images


def denormalize(images: jax.Array, data: Any) -> jax.Array:
    """Inverse of `normalize`: float32 [b, h, w, c] on [0, 1], not clipped, or in the data's own units; see there."""
    mean, std = jnp.asarray(data.mean, jnp.float32), jnp.asarray(data.std, jnp.float32)
    return images.astype(jnp.float32) * std + mean


def unit_range(data: Any) -> tuple[float, float]:
    """The values that are 0 and 1 before mean and std: (0, 1) itself where pictures are taken as they are."""
    if data.value_range is not None:
        return tuple(data.value_range)
    return (0, 255) if dtype_of(data) == np.uint8 else (0, 1)


def dtype_of(data: Any) -> np.dtype:
    """The type of the pictures. Before it is known, and in earlier checkpoints, it is uint8."""
    return np.dtype(getattr(data, "dtype", None) or np.uint8)


def valid_values(images: jax.Array) -> jax.Array | None:
    """Where images [b, h, w, c], not yet normalised, have data: bool, or None for whole numbers, which always have."""
    return ~jnp.isnan(images) if jnp.issubdtype(images.dtype, jnp.floating) else None


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of [b, h, w, c] left to right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def color_jitter(keys: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Scales brightness, contrast and saturation, in this order, by random factors (Howard 2013, arXiv 1312.5402).

    Factors are uniform in [1 - strength, 1 + strength], strength <= 1. Images [b, h, w, c] are on 0..255, not yet
    normalised; the result is float32, clipped to 0..255 after each change. Only 3 channels have a saturation.
    """
    draw = functools.partial(jax.random.uniform, shape=(3,), minval=1 - strength, maxval=1 + strength)
    factors = jax.vmap(draw)(keys)
    images = blend(images, 0.0, factors[:, 0])
    images = blend(images, grey(images).mean((1, 2), keepdims=True), factors[:, 1])
    return blend(images, grey(images), factors[:, 2]) if images.shape[-1] == 3 else images


def blend(images: jax.Array, others: jax.Array | float, factors: jax.Array) -> jax.Array:
    """Images [b, h, w, c] (0..255) times `factors` [b], plus the others times the rest to 1; clipped."""
    factors = factors[:, None, None, None]
    return jnp.clip(factors * images.astype(jnp.float32) + (1 - factors) * others, 0, 255)


def grey(images: jax.Array) -> jax.Array:
    """[b, h, w, c] -> float32 [b, h, w, 1]: the luma of 3 channels, else the mean of the channels."""
    images = images.astype(jnp.float32)
    if images.shape[-1] != 3:
        return images.mean(-1, keepdims=True)
    # A sum, not a matrix product, which accelerators may compute with fewer bits.
    return (images * jnp.asarray(LUMA, jnp.float32)).sum(-1, keepdims=True)


def random_erasing(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Fills a box of some normalised images [b, h, w, c] with N(0, 1) noise (Zhong et al., arXiv 1708.04896)."""
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    chosen = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys[:, 0])
    *boxes, found = erasing_boxes(keys[:, 1], *images.shape[1:3])
    erased = inside_boxes(boxes, *images.shape[1:3]) & (chosen & found)[:, None, None, None]
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys[:, 2])
    return jnp.where(erased, noise, images)


def erasing_boxes(keys: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
    """Boxes of random erasing: (top, left, height, width), int32 [b] each, pixels, and found: bool [b].

    The area is uniform in ERASED_AREA, the aspect log-uniform in ERASED_ASPECT. Up to ERASING_TRIES draws are made,
    until the box has a pixel and both sides are smaller than the image's; its place is uniform.
    """

    def draw(key):
        area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
        low, high = ERASED_AREA
        area = height * width * jax.random.uniform(area_key, (ERASING_TRIES,), minval=low, maxval=high)
        low, high = map(math.log, ERASED_ASPECT)
        aspect = jnp.exp(jax.random.uniform(aspect_key, (ERASING_TRIES,), minval=low, maxval=high))
        heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
        widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
        fits = (heights > 0) & (widths > 0) & (heights < height) & (widths < width)
        first = jnp.argmax(fits)  # 0 where none fits
        box_height, box_width = heights[first].clip(0, height), widths[first].clip(0, width)
        top = jax.random.randint(top_key, (), 0, height - box_height + 1)
        left = jax.random.randint(left_key, (), 0, width - box_width + 1)
        return top, left, box_height, box_width, fits.any()

    return jax.vmap(draw)(keys)


def inside_boxes(boxes: Sequence[jax.Array], height: int, width: int) -> jax.Array:
    """Masks bool [b, height, width, 1], True inside boxes (top, left, height, width), int32 [b] pixels."""
    top, left, box_height, box_width = (side[:, None] for side in boxes)
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (rows >= top) & (rows < top + box_height)
    in_columns = (columns >= left) & (columns < left + box_width)
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None]


def soft_targets(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels int [b] as float32 [b, k], the share `smoothing` spread evenly (arXiv 1512.00567, section 7)."""
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def mix(data: ConfigDict, keys: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with its partner, by mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899; `cutmix_boxes`).

    Rows 2i and 2i + 1 are partners, so the batch must be even. Both keep the same share lambda ~ Beta(alpha, alpha) of
    themselves; the key of row 2i decides everything, so results do not depend on the devices. (The reference code draws
    one lambda per batch.) Images [b, h, w, c] are normalised; for the targets [b, k] see `soft_targets`.
    """
    mixup, cutmix = data.mixup, data.cutmix  # the alphas; 0: off
    if not mixup and not cutmix:
        return images, targets
    b, height, width, _ = images.shape
    if b % 2:
        raise ValueError(f"mixing pairs the examples of a batch, but there are {b}: their number must be even")

    def draw(key):
        mix_key, switch_key, beta_key, box_key = jax.random.split(key, 4)
        mixed = jax.random.bernoulli(mix_key, data.mix_probability)
        cut = jax.random.bernoulli(switch_key, data.mix_switch_probability if mixup and cutmix else float(cutmix > 0))
        alpha = jnp.where(cut, cutmix or mixup, mixup or cutmix)
        return mixed, cut, jax.random.beta(beta_key, alpha, alpha), box_key

    # One draw per pair, then one value per row.
    mixed, cut, lam, box_keys = jax.vmap(draw)(keys.reshape(b // 2, 2)[:, 0])
    *boxes, kept = cutmix_boxes(box_keys, lam, height, width)
    lam = jnp.where(mixed, jnp.where(cut, kept, lam), 1.0)
    mixed, cut, lam, *boxes = (jnp.repeat(value, 2) for value in (mixed, cut, lam, *boxes))

    other_images, other_targets = _partners(images), _partners(targets)
    weight = lam[:, None, None, None]
    pasted = inside_boxes(boxes, height, width) & (mixed & cut)[:, None, None, None]
    blended = jnp.where(cut[:, None, None, None], images, weight * images + (1 - weight) * other_images)
    return jnp.where(pasted, other_images, blended), lam[:, None] * targets + (1 - lam[:, None]) * other_targets


def cutmix_boxes(keys: jax.Array, lam: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
    """Cutmix boxes for lambdas float [n]: (top, left, height, width), int32 [n], and the share outside, float32 [n].

    Each side is sqrt(1 - lambda) of the image's. The centre is uniform over the image, and the border clips the box.
    """

    def draw(key, lam):
        starts, sizes = [], []
        for side_key, side in zip(jax.random.split(key), (height, width), strict=True):
            size = jnp.floor(side * jnp.sqrt(1 - lam)).astype(jnp.int32)
            first = jax.random.randint(side_key, (), 0, side) - size // 2
            start, end = first.clip(0, side), (first + size).clip(0, side)
            starts.append(start)
            sizes.append(end - start)
        return *starts, *sizes, 1 - (sizes[0] * sizes[1]) / (height * width)

    return jax.vmap(draw)(keys, lam)


def _partners(rows: jax.Array) -> jax.Array:
    """Swaps rows 2i and 2i + 1 of [b, ...]; within each device that holds an even number of rows."""
    pairs = rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:])
    return pairs[:, ::-1].reshape(rows.shape)
