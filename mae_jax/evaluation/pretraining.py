"""What is measured on a masked autoencoder: its loss on unseen images, its pictures, and its features' worth."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from mae_jax.data.augment import denormalize, normalize
from mae_jax.data.device_batches import evaluation_batches
from mae_jax.data.loader import make_eval_batches
from mae_jax.data.sources import Source
from mae_jax.data.subset import RandomSubset
from mae_jax.evaluation.extraction import FeatureExtractor, one_ahead
from mae_jax.evaluation.given_masks import read_masks
from mae_jax.evaluation.pictures import TRUE_STATISTICS, UNTRAINED, draw_reconstructions
from mae_jax.evaluation.representations import describe_protocol, measure_features
from mae_jax.models.mae import MAEConfig, make_bind
from mae_jax.models.masking import given_masks
from mae_jax.models.rendering import reconstruct
from mae_jax.runtime.mesh import put, replicated
from mae_jax.runtime.seeds import make_key
from mae_jax.runtime.sharding import on_rows


class MAEEvaluation:
    """Measures parameters of one model on one data set; every number is a function of the parameters alone.

    Args:
      config: the resolved config: groups data and evaluate, and seed.
      train_source: what k-NN and the probe learn from; None if only loss and pictures are wanted.
      eval_source: what everything is measured on, each example once.

    Raises:
      UserError: for masks by hand (`evaluate.mask`) that do not fit.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: MAEConfig,
        mesh: Mesh,
        train_source: Source | None,
        eval_source: Source,
    ):
        self._config, self._model, self._mesh = config, model, mesh
        self._bind = make_bind(model)
        self.eval_source = RandomSubset(eval_source, config.evaluate.max_examples or len(eval_source))
        self.train_source = train_source and RandomSubset(
            train_source, config.evaluate.max_train_examples or len(train_source)
        )
        self._mask_ratio = model.mask_ratio if config.evaluate.mask_ratio is None else config.evaluate.mask_ratio
        given = config.evaluate.mask
        self._given = given and read_masks(given, len(self.eval_source), model.grid)
        # Each image's mask comes from the seed and the image's index: the same in every evaluation.
        self._key = make_key(config.seed, "evaluate")
        self._extractor = FeatureExtractor(self._bind, model, config, mesh)
        self._losses_on_rows = on_rows(self._losses, mesh)
        self._reconstruct_on_all = on_rows(self._reconstruct, mesh, shared=True)  # a few pictures, of any number

    @property
    def labelled(self) -> bool:
        """Whether there are classes to measure features by."""
        sources = (self.train_source, self.eval_source)
        return all(source is not None and source.num_classes > 1 for source in sources)

    @property
    def counted(self) -> str:
        """Which patches the loss is the mean of, for people: all, too, where none is hidden."""
        visible = self._given[1] if self._given else self._model.num_visible(self._mask_ratio)
        return "all" if self._model.loss_patches == "all" or visible == self._model.num_patches else "the hidden"

    @property
    def protocol(self) -> str:
        """How `features` measures, for people."""
        return describe_protocol(self._config.evaluate, self.train_source, self.eval_source)

    def loss(self, params: dict) -> float:
        """The masked loss, averaged over all evaluation images."""
        found = one_ahead(self._losses_on_rows(params, batch) for batch in self._batches(self.eval_source))
        losses, weights = np.concatenate([np.stack(jax.device_get(rows)) for rows in found], axis=1).astype(np.float64)
        return float(np.sum(losses * weights) / np.sum(weights))

    def features(self, params: dict) -> dict[str, float]:
        """Top-1 of k-NN and of a linear probe on the encoder's frozen features, and RankMe (see `measure_features`)."""
        extract = functools.partial(self._extractor, params)
        return measure_features(extract, self.train_source, self.eval_source, self._config.evaluate, self._mesh)

    def picture(self, params: dict, caption: str) -> np.ndarray:
        """Reconstructions of a few evaluation images, always the same, uint8 [height, width, 3]."""
        shown = RandomSubset(self.eval_source, self._config.evaluate.pictures)
        batches = make_eval_batches(shown, self._config.data, len(shown), *self._shape)
        with contextlib.closing(batches):
            batch = next(batches)
        rows = [batch["image"], batch["index"]]
        if self._given:
            hidden, visible = self._given
            rows.append(hidden[shown.indices[batch["index"]]])
            caption = f"{caption}; {1 - visible / self._model.num_patches:.0%} of the patches hidden, as given"
        else:
            caption = f"{caption}; {self._mask_ratio:.0%} of the patches hidden"
        images, found = jax.device_get(self._reconstruct_on_all(params, *put(rows, replicated(self._mesh))))
        if self._model.normalize_targets:
            caption = f"{caption}; {TRUE_STATISTICS}"
        if self._model.loss_patches == "hidden":
            caption = f"{caption}; {UNTRAINED}"
        return draw_reconstructions(images, found, caption)

    @property
    def _shape(self) -> tuple[tuple[int, int], int]:
        return self._model.image_size, self._model.channels

    def _batches(self, source: Source) -> Iterator[dict]:
        config = self._config
        return evaluation_batches(source, config.data, config.evaluate.batch_size, *self._shape, self._mesh)

    def _images(self, images: jax.Array) -> jax.Array:
        return normalize(images, self._config.data.mean, self._config.data.std)

    def _output(self, params, images, index, hidden=None):
        if hidden is not None:
            return self._bind(params)(images, mask=given_masks(hidden, self._given[1]))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self._key, index)
        return self._bind(params)(images, key=keys, mask_ratio=self._mask_ratio)

    def _losses(self, params, batch):
        hidden = self._given and jnp.asarray(self._given[0])[batch["index"]]
        output = self._output(params, self._images(batch["image"]), batch["index"], hidden)
        return output.example_loss, batch["weight"]

    def _reconstruct(self, params, images, index, hidden=None):
        images = self._images(images)
        output = self._output(params, images, index, hidden)
        model = self._model
        found = reconstruct(images, output.prediction, output.mask, model.patch_size, model.normalize_targets)
        to_display = functools.partial(denormalize, mean=self._config.data.mean, std=self._config.data.std)
        found = found._replace(prediction=to_display(found.prediction), pasted=to_display(found.pasted))
        return to_display(images), found
