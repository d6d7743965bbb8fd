"""Which patches the encoder sees: random masks, one for each example."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

MASK_SAMPLINGS = ("random", "block", "grid")


class Mask(NamedTuple):
    """Masks of a batch. B examples, L patches, K of them visible."""

    ids_keep: jax.Array  # [B, K] the visible patches, in shuffled order
    ids_restore: jax.Array  # [B, L] place of each patch in the shuffled order: < K is visible
    mask: jax.Array  # [B, L] float32; 1 = hidden, 0 = visible


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """int(L * (1 - mask_ratio)): rounded down in floating point, as the released models do (100 patches, .8 -> 19)."""
    return int(num_patches * (1 - mask_ratio))


def random_masks(keys: jax.Array, num_patches: int, mask_ratio: float) -> Mask:
    """Hides a uniformly random set of patches of each example. keys: [B], one key an example (paper, section 3)."""
    ids_shuffle = jax.vmap(jax.random.permutation, in_axes=(0, None))(keys, num_patches)
    return _mask_from_order(ids_shuffle, mask_ratio)


def masks_from_noise(noise: jax.Array, mask_ratio: float) -> Mask:
    """Keeps the patches with the smallest noise [B, L]; of equal values the earlier patch comes first.

    The noise should be float32: in bfloat16 about half of 196 uniform draws coincide, which biases the masks.
    """
    return _mask_from_order(jnp.argsort(noise, axis=1, stable=True), mask_ratio)


def _mask_from_order(ids_shuffle: jax.Array, mask_ratio: float) -> Mask:
    num_patches = ids_shuffle.shape[1]
    keep = num_visible(num_patches, mask_ratio)
    ids_restore = jnp.argsort(ids_shuffle, axis=1)
    mask = (ids_restore >= keep).astype(jnp.float32)
    return Mask(ids_shuffle[:, :keep], ids_restore, mask)


def take_patches(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` [B, K] of each example of x [B, L, D] (or of one table [L, D] for all): [B, K, D]."""
    if x.ndim == 2:
        return x[ids]
    return jnp.take_along_axis(x, ids[:, :, None], axis=1)
