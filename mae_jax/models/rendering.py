"""Per-patch normalisation, and predictions as images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mae_jax.models.patches import grid_size, patchify, unpatchify


class Reconstructions(NamedTuple):
    """Images [B, H, W, C] in the model's normalised units, except `visible`."""

    prediction: jax.Array
    pasted: jax.Array  # the prediction, with the true visible patches
    visible: jax.Array  # [B, H, W, 1]: 1 where the encoder saw the pixel


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and unbiased variance of each patch [B, L, p*p*C] over all its values: [B, L, 1] each."""
    return jnp.mean(patches, axis=-1, keepdims=True), jnp.var(patches, axis=-1, keepdims=True, ddof=1)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """The targets of section 3 (reconstruction target): (x - mean) / sqrt(variance + 1e-6), patch by patch."""
    mean, variance = patch_statistics(patches)
    return (patches - mean) * jax.lax.rsqrt(variance + 1e-6)


def denormalize_patches(normalized: jax.Array, patches: jax.Array) -> jax.Array:
    """Inverts `normalize_patches`, with the statistics of the true patches."""
    mean, variance = patch_statistics(patches)
    return normalized * jnp.sqrt(variance + 1e-6) + mean


def reconstruct(
    images: jax.Array, prediction: jax.Array, mask: jax.Array, patch_size: int, normalized_targets: bool
) -> Reconstructions:
    """Turns predictions [B, L, p*p*C] for images [B, H, W, C] with mask [B, L] into images.

    Predictions of normalised targets get the true patches' mean and variance; captions must say so.
    """
    grid = grid_size(images.shape[1:3], patch_size)
    patches = patchify(images, patch_size)
    prediction = denormalize_patches(prediction, patches) if normalized_targets else prediction
    hidden = mask[:, :, None]
    pasted = prediction * hidden + patches * (1 - hidden)
    visible = jnp.broadcast_to(1 - hidden, (*hidden.shape[:2], patch_size**2))
    return Reconstructions(*(unpatchify(x, patch_size, grid) for x in (prediction, pasted, visible)))
