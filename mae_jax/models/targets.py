"""Reconstruction targets: pixels, normalised pixels, or principal components."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_jax.models.patches import patchify
from mae_jax.models.rendering import normalize_patches
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

    def __call__(self, patches: jax.Array) -> jax.Array:
        """Targets [B, L, dim] of patches [B, L, p*p*C]."""
        return patches

    def to_patches(self, prediction: jax.Array) -> jax.Array:
        """Predictions [B, L, dim] as patches [B, L, p*p*C]."""
        return prediction

    def fit(self, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Fits the target's variables to batches of normalised images [b, H, W, C]; returns values by name."""
        raise NotImplementedError


@TARGETS.register("normalized_pixels")
class NormalizedPixels(Target):
    """Pixels normalised by the patch's own mean and variance (paper, section 3, reconstruction target)."""

    normalized = True

    def __call__(self, patches: jax.Array) -> jax.Array:
        return normalize_patches(patches)


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

    def __call__(self, patches: jax.Array) -> jax.Array:
        return jnp.matmul(patches - self.mean[...], self.components[...].T, precision="highest")

    def to_patches(self, prediction: jax.Array) -> jax.Array:
        return jnp.matmul(prediction, self.components[...], precision="highest") + self.mean[...]

    def fit(self, batches: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Mean [p*p*C] and orthonormal components [pca_targets, p*p*C], by decreasing variance.

        The largest value of each component is positive. Sums are float64. UserError if there are too few patches.
        """
        dim, wanted = self.config.patch_dim, self.config.pca_targets
        count, total, products = 0, np.zeros(dim), np.zeros((dim, dim))
        for images in batches:
            patches = np.asarray(patchify(images, self.config.patch_size), np.float64).reshape(-1, dim)
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
