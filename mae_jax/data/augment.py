"""Augmentation of whole batches on the device, inside the compiled step: normalising, flipping, colours, erasing.

All randomness of an example comes from its own key, so that it is the same on any number of devices. A key serves one
function: split it for several. Keys are typed JAX keys [b].
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
    """Inverse of `normalize`, to float32 [b, h, w, c] where 0 is black and 1 is white; not clipped."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return images.astype(jnp.float32) * std + mean


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image of [b, h, w, c] left to right with probability 1/2."""
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def color_jitter(keys: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Scales brightness, contrast and saturation, in this order, by random factors (Howard 2013, arXiv 1312.5402).

    Args:
      images: [b, h, w, c] on 0..255, uint8 or float: before they are normalised.
      strength: the factors are uniform in [1 - strength, 1 + strength]; at most 1.

    Returns:
      float32 [b, h, w, c] on 0..255, clipped after each change. Only images of 3 channels have a saturation.
    """

    def draw(key):
        return jax.random.uniform(key, (3,), minval=1 - strength, maxval=1 + strength)

    factors = jax.vmap(draw)(keys)
    images = adjust_brightness(images, factors[:, 0])
    images = adjust_contrast(images, factors[:, 1])
    return adjust_saturation(images, factors[:, 2]) if images.shape[-1] == 3 else images


def adjust_brightness(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Blends each image [b, h, w, c] (0..255) with black: its factor [b] is the image's weight. float32, clipped."""
    return _blend(images, 0.0, factors)


def adjust_contrast(images: jax.Array, factors: jax.Array) -> jax.Array:
    """The same with the mean of its grey picture."""
    return _blend(images, _grey(images).mean((1, 2), keepdims=True), factors)


def adjust_saturation(images: jax.Array, factors: jax.Array) -> jax.Array:
    """The same with its grey picture."""
    return _blend(images, _grey(images), factors)


def _blend(images: jax.Array, others: jax.Array | float, factors: jax.Array) -> jax.Array:
    factors = factors[:, None, None, None]
    return jnp.clip(factors * images.astype(jnp.float32) + (1 - factors) * others, 0, 255)


def _grey(images: jax.Array) -> jax.Array:
    """[b, h, w, c] -> float32 [b, h, w, 1]: the luma of 3 channels, the mean of other numbers of them."""
    images = images.astype(jnp.float32)
    if images.shape[-1] != 3:
        return images.mean(-1, keepdims=True)
    # A sum and no matrix product, which accelerators may compute with fewer bits.
    return (images * jnp.asarray(LUMA, jnp.float32)).sum(-1, keepdims=True)


def random_erasing(keys: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Replaces a random box (see `erasing_boxes`) by noise of mean 0 and deviation 1 (Zhong et al., arXiv 1708.04896).

    Args:
      images: float32 [b, h, w, c], normalised.
      probability: of an image to get a box.
    """
    _, height, width, channels = images.shape
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    chosen = jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys[:, 0])
    top, left, box_height, box_width, found = erasing_boxes(keys[:, 1], height, width)
    erased = inside_boxes(top, left, box_height, box_width, height, width) & (chosen & found)[:, None, None, None]
    noise = jax.vmap(lambda key: jax.random.normal(key, (height, width, channels)))(keys[:, 2])
    return jnp.where(erased, noise, images)


def erasing_boxes(keys: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
    """Draws the boxes of random erasing in pictures of `height` x `width` pixels.

    Area uniform in ERASED_AREA, aspect log-uniform in ERASED_ASPECT, drawn until the box has a pixel and is both less
    high and less wide than the picture, ERASING_TRIES times at most; the place is uniform.

    Returns:
      (top, left, height, width), int32 [b] each, pixels, and found: bool [b], False where no draw fitted.
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
    """Boxes in pixels, int32 [b] each, -> bool [b, height, width, 1], True inside."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < (top + box_height)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + box_width)[:, None])
    return (in_rows[:, :, None] & in_columns[:, None, :])[..., None]
