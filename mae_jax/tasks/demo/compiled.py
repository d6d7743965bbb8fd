"""The page's model: two functions of one image, each compiled once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.augment import denormalize, dtype_of
from mae_jax.evaluation.evaluator import pool
from mae_jax.interop.weights import make_bind_of
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import is_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.models.encoder import find_layer
from mae_jax.models.masking import masks_of_any_number
from mae_jax.models.targets import TARGETS, reconstruct


class Look(NamedTuple):
    """What the encoder makes of a whole picture."""

    attention: np.ndarray  # [heads, 1 + L, C + R + L]: of the class token and patches to all tokens, in the last block
    feature: np.ndarray  # [D], as `evaluate.token` says
    outputs: np.ndarray | None  # [K] of a classifier


class CompiledModel:
    """A model on one device."""

    def __init__(self, weights: Weights, config: ConfigDict):
        self.config, self._data, self._token = MAEConfig(**config.model), config.data, config.evaluate.token
        self._layer = config.evaluate.layer
        if self._layer is not None:
            find_layer(self._layer, self.config.depth, "evaluate.layer: ")
        self.classifies = is_classifier(weights.config)
        self.reconstructs = not self.classifies and "decoder" in weights.params
        self.normalized = TARGETS.find(self.config.target_name).normalized
        self._bind, self._params = make_bind_of(weights), jax.device_put(weights.params, jax.devices()[0])
        self._look_fn, self._reconstruct_fn = jax.jit(self._look), jax.jit(self._reconstruct)

    def compile(self) -> None:
        """Compiles for all pictures and masks, so that the first click is quick."""
        image = jnp.zeros((1, *self.config.image_size, self.config.channels))
        self.look(image)
        if self.reconstructs:
            valid = jnp.ones(image.shape, bool) if np.issubdtype(dtype_of(self._data), np.floating) else None
            self.reconstruct(image, valid, np.zeros((1, self.config.num_patches), bool))

    def look(self, image: jax.Array) -> Look:
        """Of an image [1, H, W, C], normalised."""
        return Look(*jax.device_get(self._look_fn(self._params, image)))

    def reconstruct(
        self, image: jax.Array, valid: jax.Array | None, hidden: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """The prediction, and it with the visible patches, as by `denormalize`, and the loss; `hidden`: [1, L]."""
        return jax.device_get(self._reconstruct_fn(self._params, image, valid, hidden))

    def _look(self, params: dict, image: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        model, classes = self._bind(params), self.config.class_tokens
        found, layer = model.encode(image, output_attentions=True), self._layer
        tokens = found.features if layer is None else model.encode(image, layers=(layer,))[0]
        attention = found.attentions[-1, 0]
        attention = jnp.concatenate([attention[:, :1], attention[:, classes + self.config.registers :]], axis=1)
        feature = pool(tokens, self._token, classes)[0]
        return attention, feature, model(image)[0] if self.classifies else None

    def _reconstruct(self, params: dict, image: jax.Array, valid: jax.Array | None, hidden: jax.Array) -> tuple:
        output = self._bind(params)(image, mask=masks_of_any_number(hidden), valid=valid)
        found = reconstruct(image, output.prediction, output.mask, self.config.patch_size, self.normalized, valid)
        return *(denormalize(x, self._data) for x in (found.prediction, found.pasted)), output.loss
