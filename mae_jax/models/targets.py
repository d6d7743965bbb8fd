"""Reconstruction targets (pixels, normalised pixels, or principal components), and predictions as images."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_jax.models.patches import grid_size, patchify, unpatchify
from mae_jax.runtime.errors import UserError
from mae_jax.settings.registry import Registry

TARGETS: Registry[type["Target"]] = Registry("model.target")


@TARGETS.register("pixels")
class Target(nnx.Module):
    """The pixels of a patch, and the base class of targets. `fit` sets a target's `nnx.Variable`s before training."""

    normalized = False  # True: predictions lack each patch's mean and variance; pictures use the true patch's

    def __init__(self, config: Any):  # MAEConfig
        self.config = config

    @staticmethod
    def dim(config: Any) -> int:
        """Number of values predicted for a patch."""
        return config.patch_dim

    def __call__(self, patches: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """Targets [B, L, dim] of patches [B, L, p*p*C]. `valid`, not given for whole numbers: bool, False: no data."""
        return patches

    def counted(self, valid: jax.Array) -> jax.Array:
        """The values [B, L, dim or 1] that the loss counts, by the valid ones [B, L, p*p*C] of the patches: bool.

        If targets are not pixels, patches that lack some data are left out.
        """
        of_pixels = self.dim(self.config) == self.config.patch_dim
        return valid if of_pixels else jnp.all(valid, axis=-1, keepdims=True)

    def to_patches(self, prediction: jax.Array) -> jax.Array:
        """Predictions [B, L, dim] as patches [B, L, p*p*C]."""
        return prediction

    def fit(self, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Fits the target's variables to batches of normalised images [b, H, W, C]; returns values by name.

        NaN: no data.
        """
        raise NotImplementedError


@TARGETS.register("normalized_pixels")
class NormalizedPixels(Target):
    """Pixels normalised by the patch's own mean and variance (paper, section 3, reconstruction target)."""

    normalized = True

    def __call__(self, patches: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        return normalize_patches(patches, valid)


@TARGETS.register("principal_components")
class PrincipalComponents(Target):
    """The first `config.pca_targets` principal components of the data's patches (paper, section 4.1)."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.mean = nnx.Variable(jnp.zeros(config.patch_dim))
        self.components = nnx.Variable(jnp.eye(config.pca_targets, config.patch_dim))

    @staticmethod
    def dim(config: Any) -> int:
        return config.pca_targets

    def __call__(self, patches: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        return jnp.matmul(patches - self.mean[...], self.components[...].T, precision="highest")

    def counted(self, valid: jax.Array) -> jax.Array:
        return jnp.all(valid, axis=-1, keepdims=True)

    def to_patches(self, prediction: jax.Array) -> jax.Array:
        return jnp.matmul(prediction, self.components[...], precision="highest") + self.mean[...]

    def fit(self, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Mean [p*p*C] and orthonormal components [pca_targets, p*p*C] by variance, their largest value positive."""
        dim, wanted = self.config.patch_dim, self.config.pca_targets
        count, total, products = 0, np.zeros(dim), np.zeros((dim, dim))
        for images in batches:
            patches = np.asarray(patchify(images, self.config.patch_size), np.float64).reshape(-1, dim)
            patches = patches[~np.isnan(patches).any(axis=1)]
            count += len(patches)
            total += patches.sum(axis=0)
            products += patches.T @ patches
        if count < wanted:
            raise UserError(f"model.pca_targets={wanted} is more than the {count} patches of the training data")
        mean = total / count
        _, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
        components = vectors.T[::-1][:wanted]
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        return {"mean": mean.astype(np.float32), "components": (components * np.sign(largest)).astype(np.float32)}


class Reconstructions(NamedTuple):
    """Images [B, H, W, C] in the model's normalised units, except `visible`."""

    prediction: jax.Array
    pasted: jax.Array  # the prediction, with the true visible patches
    visible: jax.Array  # [B, H, W, 1]: 1 where the encoder saw the pixel


def normalize_patches(patches: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-6) of each patch [B, L, p*p*C]; unbiased variance; both of `valid` values."""
    mean, variance = _statistics(patches, valid)
    return (patches - mean) * jax.lax.rsqrt(variance + 1e-6)


def reconstruct(
    images: jax.Array,
    prediction: jax.Array,
    mask: jax.Array,
    patch_size: int,
    normalized_targets: bool,
    valid: jax.Array | None = None,
) -> Reconstructions:
    """Predictions [B, L, p*p*C] for images [B, H, W, C] as images; normalised ones get the true patches' statistics.

    `valid`: where the images have data, bool [B, H, W, C].
    """
    grid = grid_size(images.shape[1:3], patch_size)
    patches = patchify(images, patch_size)
    if normalized_targets:
        mean, variance = _statistics(patches, None if valid is None else patchify(valid, patch_size))
        prediction = prediction * jnp.sqrt(variance + 1e-6) + mean
    hidden = mask[:, :, None]
    pasted = prediction * hidden + patches * (1 - hidden)
    visible = jnp.broadcast_to(1 - hidden, (*hidden.shape[:2], patch_size**2))
    return Reconstructions(*(unpatchify(x, patch_size, grid) for x in (prediction, pasted, visible)))


def _statistics(patches: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Mean and unbiased variance [B, L, 1] of the valid values of patches; 0 where there are none."""
    if valid is None:
        return jnp.mean(patches, axis=-1, keepdims=True), jnp.var(patches, axis=-1, keepdims=True, ddof=1)
    total = functools.partial(jnp.sum, axis=-1, keepdims=True, where=valid)
    count = jnp.sum(valid, axis=-1, keepdims=True)
    mean = total(patches) / jnp.maximum(count, 1)
    return mean, total((patches - mean) ** 2) / jnp.maximum(count - 1, 1)
