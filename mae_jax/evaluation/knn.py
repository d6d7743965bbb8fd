"""Weighted k-nearest-neighbour classification of frozen features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 1024  # queries classified at a time, which bounds the memory of the similarities: BLOCK x N floats


def knn_predict(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, *, num_classes: int, k: int, temperature: float
) -> np.ndarray:
    """Predicted classes [M] of test features [M, D] by their k nearest training features [N, D].

    Near is a large cosine. Each neighbour votes for its class with weight exp(cosine / temperature), as in instance
    discrimination (Wu et al. 2018, arXiv 1805.01978, section 3.4). With fewer than k training features all vote.
    """
    train, labels = jnp.asarray(_unit(train)), jnp.asarray(train_labels)
    k = min(k, len(train))
    blocks = (test[start : start + BLOCK] for start in range(0, len(test), BLOCK))
    votes = [_vote(train, labels, _unit(block), num_classes, k, temperature) for block in blocks]
    return np.concatenate([np.asarray(block) for block in votes])


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("num_classes", "k"))
def _vote(train, labels, queries, num_classes, k, temperature):
    cosine = jnp.matmul(queries, train.T, precision="highest")
    nearest, ids = jax.lax.top_k(cosine, k)
    weights = jnp.exp((nearest - 1) / temperature)  # the constant factor exp(-1 / temperature) prevents overflow
    votes = jnp.einsum("mk,mkc->mc", weights, jax.nn.one_hot(labels[ids], num_classes))
    return jnp.argmax(votes, axis=1)
