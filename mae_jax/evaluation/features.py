"""Frozen features of a data set."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np


def pool(tokens: jax.Array, token: str) -> jax.Array:
    """One feature an image from tokens [B, 1 + L, D] (class token first): "class": it, "mean": the patches' mean."""
    return tokens[:, 0] if token == "class" else jnp.mean(tokens[:, 1:], axis=1)


def extract_features(feature_fn: Callable[[dict], jax.Array], batches: Iterator[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] (float32) and labels [N] of every example of an evaluation run, in order.

    Args:
      feature_fn: a device batch -> features [B, D].
      batches: device batches with "label" and "weight"; rows of weight 0 are padding and left out.
    """
    features, labels = [], []
    for batch in batches:
        real = np.asarray(batch["weight"]) > 0
        features.append(np.asarray(feature_fn(batch), np.float32)[real])
        labels.append(np.asarray(batch["label"])[real])
    return np.concatenate(features), np.concatenate(labels)
