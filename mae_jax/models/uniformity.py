"""How alike the features of different images are."""

import jax
import jax.numpy as jnp

from mae_jax.runtime.sharding import all_rows


def uniformity(features: jax.Array) -> jax.Array:
    """The mean squared cosine of the features [B, D] of two different images of the batch, over all devices.

    The regulariser of U-MAE (Zhang et al. 2022, arXiv 2210.08344, section 4): with it a masked autoencoder's features
    do not collapse into a few dimensions. Of a single image it is 0. (The authors' code counts each image with itself
    too, which adds a constant.)
    """
    features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    others = all_rows(features)
    cosines = jnp.matmul(features, others.T, precision="highest")
    own = jnp.sum(features**2, axis=1) ** 2  # each image with itself
    return (jnp.sum(cosines**2) - jnp.sum(own)) / (len(features) * max(len(others) - 1, 1))
