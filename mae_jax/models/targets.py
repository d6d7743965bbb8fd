"""What the decoder predicts of a patch: its pixels, normalised pixels, or their principal components."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_jax.models.config import MAEConfig
from mae_jax.models.patches import patchify
from mae_jax.models.rendering import normalize_patches
from mae_jax.runtime.errors import UserError


class PatchBasis(nnx.Module):
    """Principal components of patches as coordinates (paper, section 4.1, reconstruction target).

    The values are fitted to data (`fit_patch_basis`) and never trained.
    """

    def __init__(self, patch_dim: int, components: int):
        self.mean = nnx.Variable(jnp.zeros(patch_dim))
        self.components = nnx.Variable(jnp.eye(components, patch_dim))

    def coefficients(self, patches: jax.Array) -> jax.Array:  # [..., p*p*C] -> [..., components]
        return jnp.matmul(patches - self.mean[...], self.components[...].T, precision="highest")

    def to_patches(self, coefficients: jax.Array) -> jax.Array:  # [..., components] -> [..., p*p*C]
        return jnp.matmul(coefficients, self.components[...], precision="highest") + self.mean[...]


def make_targets(patches: jax.Array, config: MAEConfig, basis: PatchBasis | None) -> jax.Array:
    """What is to be predicted of patches [B, L, p*p*C]: [B, L, target_dim]."""
    if basis is not None:
        return basis.coefficients(patches)
    return normalize_patches(patches) if config.normalize_targets else patches


def fit_patch_basis(batches: Iterable[np.ndarray], config: MAEConfig) -> dict[str, np.ndarray]:
    """The mean and the first `config.pca_targets` principal components of the patches of images [b, H, W, C].

    Returns:
      The values of a PatchBasis: mean [p*p*C], and components [pca_targets, p*p*C], orthonormal, the one with the
      largest variance first; each with the sign that makes its largest value positive. Sums are float64.

    Raises:
      UserError: if there are fewer patches than components.
    """
    count, total, products = 0, np.zeros(config.patch_dim), np.zeros((config.patch_dim, config.patch_dim))
    for images in batches:
        patches = np.asarray(patchify(images, config.patch_size), np.float64).reshape(-1, config.patch_dim)
        count += len(patches)
        total += patches.sum(axis=0)
        products += patches.T @ patches
    if count < config.pca_targets:
        raise UserError(f"model.pca_targets={config.pca_targets} is more than the {count} patches of the training data")
    mean = total / count
    _, vectors = np.linalg.eigh(products / count - np.outer(mean, mean))
    components = vectors.T[::-1][: config.pca_targets]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    return {"mean": mean.astype(np.float32), "components": (components * np.sign(largest)).astype(np.float32)}
