"""The uniformity regulariser of U-MAE."""

import jax
import jax.numpy as jnp

from mae_jax.runtime.sharding import all_rows


def uniformity(features: jax.Array) -> jax.Array:
    """The mean squared cosine between features [B, D] of different images, over all devices; 0 for one image.

    It keeps features from collapsing into a few dimensions (Zhang et al. 2022, arXiv 2210.08344, section 4). The
    authors' code also pairs each image with itself, which adds a constant.
    """
    features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    others = all_rows(features)
    cosines = jnp.matmul(features, others.T, precision="highest")
    own = jnp.sum(features**2, axis=1) ** 2  # each image with itself
    return (jnp.sum(cosines**2) - jnp.sum(own)) / (len(features) * max(len(others) - 1, 1))
