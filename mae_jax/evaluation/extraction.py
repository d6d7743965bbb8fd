"""Frozen features of a data set."""

from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.runtime.mesh import whole


def pool(tokens: jax.Array, token: str, class_tokens: int = 1) -> jax.Array:
    """Features [B, D] from tokens [B, C + L, D]: the mean of the C class tokens (token="class") or of the L patches."""
    return jnp.mean(tokens[:, :class_tokens] if token == "class" else tokens[:, class_tokens:], axis=1)


def extract_features(
    feature_fn: Callable[[dict], jax.Array], batches: Iterable[dict], count: int, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] (float32) and labels [N] (int64) of all N = count examples, in order.

    Args:
      feature_fn: device batch -> features [B, D] or tokens [B, L, D].
      batches: device batches with "label" and "weight"; rows of weight 0 are padding.
      out: an array to fill, such as a memory map; None allocates one.
    """
    labels, done = np.empty(count, np.int64), 0
    computed = ((feature_fn(batch), *whole((batch["label"], batch["weight"]))) for batch in batches)
    for found, label, weight in one_ahead(computed):
        out = np.empty((count, *found.shape[1:]), np.float32) if out is None else out
        real = np.asarray(weight) > 0
        rows = slice(done, done + np.count_nonzero(real))
        out[rows], labels[rows] = np.asarray(found)[real], np.asarray(label)[real]
        done = rows.stop
    if done != count or out is None:
        raise ValueError(f"the batches have {done:,} examples; count={count:,} must be their number, at least 1")
    return out, labels


def one_ahead(items: Iterable) -> Iterator:
    """Yields each item only after the next one is made, which keeps the device busy."""
    items = iter(items)
    for item in items:
        for following in items:
            yield item
            item = following
        yield item
