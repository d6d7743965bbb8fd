"""Augmentation of whole batches on the device, inside the compiled step: normalising, flipping, colours, erasing.

Each example's randomness comes from its own key, so it is the same on any number of devices. Use a key for one function
only: split it for several. Keys are typed JAX keys [b].
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601-2, as in Pillow's greys
ERASED_AREA = (0.02, 1 / 3)  # share of the picture
ERASED_ASPECT = (0.3, 1 / 0.3)  # height / width
ERASING_TRIES = 10


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps [b, h, w, c] on 0..255 (uint8 or float) to float32 (x / 255 - mean) / std; one value serves all channels."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Inverse of `normalize`: float32 [b, h, w, c] with 0 as black and 1 as white, not clipped."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return images.astype(jnp.float32) * std + mean


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of [b, h, w, c] left to right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def color_jitter(keys: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Scales brightness, contrast and saturation, in this order, by random factors (Howard 2013, arXiv 1312.5402).

    Factors are uniform in [1 - strength, 1 + strength], strength <= 1. Images [b, h, w, c] are on 0..255, not yet
    normalised; the result is float32, clipped to 0..255 after each change. Only 3 channels have a saturation.
    """

    def draw(key):
        return jax.random.uniform(key, (3,), minval=1 - strength, maxval=1 + strength)

    factors = jax.vmap(draw)(keys)
    images = adjust_brightness(images, factors[:, 0])
    images = adjust_contrast(images, factors[:, 1])
    return adjust_saturation(images, factors[:, 2]) if images.shape[-1] == 3 else images


def adjust_brightness(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Blends images [b, h, w, c] (0..255) with black, the images weighted by `factors` [b]. float32, clipped."""
    return _blend(images, 0.0, factors)


def adjust_contrast(images: jax.Array, factors: jax.Array) -> jax.Array:
    """As `adjust_brightness`, but blends with the mean of the grey image."""
    return _blend(images, _grey(images).mean((1, 2), keepdims=True), factors)


def adjust_saturation(images: jax.Array, factors: jax.Array) -> jax.Array:
    """As `adjust_brightness`, but blends with the grey image."""
    return _blend(images, _grey(images), factors)


def _blend(images: jax.Array, others: jax.Array | float, factors: jax.Array) -> jax.Array:
    factors = factors[:, None, None, None]
    return jnp.clip(factors * images.astype(jnp.float32) + (1 - factors) * others, 0, 255)


def _grey(images: jax.Array) -> jax.Array:
    """[b, h, w, c] -> float32 [b, h, w, 1]: the luma of 3 channels, else the mean of the channels."""
    images = images.astype(jnp.float32)
    if images.shape[-1] != 3:
        return images.mean(-1, keepdims=True)
    # A sum, not a matrix product, which accelerators may compute with fewer bits.
    return (images * jnp.asarray(LUMA, jnp.float32)).sum(-1, keepdims=True)


def random_erasing(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Fills a box of some normalised images [b, h, w, c] with N(0, 1) noise (Zhong et al., arXiv 1708.04896)."""
    _, height, width, channels = images.shape
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    chosen = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys[:, 0])
    top, left, box_height, box_width, found = erasing_boxes(keys[:, 1], height, width)
    erased = inside_boxes(top, left, box_height, box_width, height, width) & (chosen & found)[:, None, None, None]
    noise = jax.vmap(lambda key: jax.random.normal(key, (height, width, channels)))(keys[:, 2])
    return jnp.where(erased, noise, images)


def erasing_boxes(keys: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
    """Draws the boxes of random erasing in images of `height` x `width` pixels.

    The area is uniform in ERASED_AREA, the aspect log-uniform in ERASED_ASPECT. Up to ERASING_TRIES draws are made,
    until the box has a pixel and both sides are smaller than the image's; its place is uniform. Returns (top, left,
    height, width), int32 [b] each, pixels, and found: bool [b], False where no draw fitted.
    """

    def draw(key):
        area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
        low, high = ERASED_AREA
        area = height * width * jax.random.uniform(area_key, (ERASING_TRIES,), minval=low, maxval=high)
        low, high = math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])
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


def inside_boxes(
    top: jax.Array, left: jax.Array, box_height: jax.Array, box_width: jax.Array, height: int, width: int
) -> jax.Array:
    """Masks bool [b, height, width, 1], True inside boxes given in pixels, int32 [b] each."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
