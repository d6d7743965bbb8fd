"""Mixes the examples of a batch on the device, by mixup and cutmix, with the soft targets that they need."""

import jax
import jax.numpy as jnp

from mae_jax.data.augment import inside_boxes


def soft_targets(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
    """Labels int [b] as smoothed distributions float32 [b, k] (Szegedy et al. 2016, arXiv 1512.00567, section 7).

    The share `smoothing` s is spread evenly: the label gets 1 - s + s / k, every other class s / k.
    """
    return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def mix(
    keys: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    probability: float,
    switch_probability: float,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with its partner, by mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899; `cutmix_boxes`).

    Rows 2i and 2i + 1 are partners. Both keep the same share lambda ~ Beta(alpha, alpha) of themselves; the key of row
    2i decides everything. (The recipe's reference code draws one lambda per batch and pairs row i with row b - 1 - i.
    One per pair of neighbours keeps results independent of the devices; shuffling makes the pairs random either way.)

    Args:
      keys: typed JAX keys [b]; b must be even.
      images: float [b, h, w, c], normalised.
      targets: float [b, k]; see `soft_targets`.
      mixup, cutmix: their alphas; 0 means off.
      probability: that a pair is mixed at all.
      switch_probability: that a pair gets cutmix rather than mixup, if both are on.
    """
    if not mixup and not cutmix:
        return images, targets
    b, height, width, _ = images.shape
    if b % 2:
        raise ValueError(f"mixing pairs the examples of a batch, but there are {b}: their number must be even")

    def draw(key):
        mix_key, switch_key, beta_key, box_key = jax.random.split(key, 4)
        mixed = jax.random.bernoulli(mix_key, probability)
        cut = jax.random.bernoulli(switch_key, switch_probability if mixup and cutmix else float(cutmix > 0))
        alpha = jnp.where(cut, cutmix or mixup, mixup or cutmix)
        return mixed, cut, jax.random.beta(beta_key, alpha, alpha), box_key

    # One draw per pair, then one value per row.
    mixed, cut, lam, box_keys = jax.vmap(draw)(keys.reshape(b // 2, 2)[:, 0])
    *boxes, kept = cutmix_boxes(box_keys, lam, height, width)
    lam = jnp.where(mixed, jnp.where(cut, kept, lam), 1.0)
    mixed, cut, lam, *boxes = (jnp.repeat(value, 2) for value in (mixed, cut, lam, *boxes))

    other_images, other_targets = _partners(images), _partners(targets)
    weight = lam[:, None, None, None]
    pasted = inside_boxes(*boxes, height, width) & (mixed & cut)[:, None, None, None]
    blended = jnp.where(cut[:, None, None, None], images, weight * images + (1 - weight) * other_images)
    return jnp.where(pasted, other_images, blended), lam[:, None] * targets + (1 - lam[:, None]) * other_targets


def cutmix_boxes(keys: jax.Array, lam: jax.Array, height: int, width: int) -> tuple[jax.Array, ...]:
    """Draws cutmix boxes by keys [n] and lambdas float [n], in images of `height` x `width` pixels.

    Each side is sqrt(1 - lambda) of the image's, in whole pixels. The centre is uniform over the image, and the border
    clips the box. Returns (top, left, height, width), int32 [n] each, pixels, and float32 [n]: the share of pixels
    outside the box.
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
