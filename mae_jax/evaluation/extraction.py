"""Frozen features of a data set."""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mae_jax.data.augment import normalize
from mae_jax.data.device_batches import evaluation_batches
from mae_jax.data.sources import Source
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.mesh import whole
from mae_jax.runtime.sharding import on_rows


def pool(tokens: jax.Array, token: str, class_tokens: int = 1) -> jax.Array:
    """One feature an image from tokens [B, C + L, D], class tokens first: the mean of these, or of the others."""
    return jnp.mean(tokens[:, :class_tokens] if token == "class" else tokens[:, class_tokens:], axis=1)


class FeatureExtractor:
    """Computes one feature an image, on all devices: `extractor(variables, source)` for one encoder after another.

    Args:
      bind: variables -> a model with `encode`.
      config: groups data (how pictures are prepared) and evaluate (token, batch_size).
    """

    def __init__(self, bind: Callable[[dict], object], model: MAEConfig, config: ml_collections.ConfigDict, mesh: Mesh):
        self._bind, self._model, self._config, self._mesh = bind, model, config, mesh
        self._features_of = on_rows(self._features, mesh)

    def __call__(self, variables: dict, source: Source, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] and labels [N] of a source; see `extract_features`."""
        size = self._config.evaluate.batch_size
        batches = evaluation_batches(
            source, self._config.data, size, self._model.image_size, self._model.channels, self._mesh
        )
        return extract_features(functools.partial(self._features_of, variables), batches, len(source), out)

    def _features(self, variables: dict, batch: dict) -> jax.Array:
        data = self._config.data
        tokens = self._bind(variables).encode(normalize(batch["image"], data.mean, data.std))
        return pool(tokens, self._config.evaluate.token, self._model.class_tokens)


def extract_features(
    feature_fn: Callable[[dict], jax.Array], batches: Iterable[dict], count: int, out: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] (float32) and labels [N] (int64) of every example of an evaluation run, in order.

    A batch's features are fetched while the next one's are computed, straight into their place.

    Args:
      feature_fn: a device batch -> features [B, D], or tokens [B, L, D], such as `on_rows` makes.
      batches: device batches with "label" and "weight"; rows of weight 0 are padding and left out.
      count: N, the number of examples in the batches.
      out: where the features go, [N, D], such as a file mapped by `np.lib.format.open_memmap`; None: new memory.

    Raises:
      ValueError: if the batches have more or fewer examples than `count`, or `out` is for another number of them.
    """
    if out is not None and len(out) != count:
        raise ValueError(f"out has {len(out):,} rows for {count:,} examples; give it one row an example")
    labels, done = np.empty(count, np.int64), 0
    computed = ((feature_fn(batch), *whole((batch["label"], batch["weight"]))) for batch in batches)
    for found, label, weight in one_ahead(computed):
        if out is None:
            out = np.empty((count, *found.shape[1:]), np.float32)
        real = np.asarray(weight) > 0
        end = done + np.count_nonzero(real)
        if end > count:
            raise ValueError(f"the batches have more than {count:,} examples; count must be their number")
        out[done:end], labels[done:end] = np.asarray(found)[real], np.asarray(label)[real]
        done = end
    if done != count or out is None:
        raise ValueError(f"the batches have {done:,} examples; count={count:,} must be their number, at least 1")
    return out, labels


def one_ahead(items: Iterable) -> Iterator:
    """The same items, each handed on only after the next one was made: two are in flight on the device, no more."""
    items = iter(items)
    for item in items:
        for following in items:
            yield item
            item = following
        yield item
