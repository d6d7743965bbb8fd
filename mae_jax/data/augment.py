"""Augmentation on the device, inside the compiled step: normalising and flipping whole batches."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps uint8 [b, h, w, c] to float32 (x / 255 - mean) / std; one value serves all channels."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


def denormalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Inverse of `normalize`, float32 [b, h, w, c] on the scale where 0 is black and 1 is white; not clipped."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return images.astype(jnp.float32) * std + mean


def random_flip(keys: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2, decided by its own key alone.

    Args:
      keys: typed JAX keys [b].
      images: [b, h, w, c], any dtype.
    """
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
