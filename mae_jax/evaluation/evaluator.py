"""The interface of evaluators: a class built from (config, data), whose `run(state)` yields names and values."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.augment import normalize
from mae_jax.data.device_batches import evaluation_batches
from mae_jax.data.sources import RandomSubset, Source, count_images
from mae_jax.evaluation.extraction import extract_features, pool
from mae_jax.evaluation.hidden_patches import HiddenPatches
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.sharding import on_rows
from mae_jax.settings.registry import Registry

EVALUATORS: Registry[type["Evaluator"]] = Registry("evaluate.evaluators")


class State(Protocol):
    """A model to evaluate: the state of a training run, or a `Trained`."""

    step: Any  # steps done: an int or a scalar array

    def variables(self) -> dict:
        """The model's variables as one nested dict, placed on the mesh."""


class Trained(NamedTuple):
    """A model that is not being trained, such as a checkpoint."""

    step: int
    values: dict  # see `State.variables`
    name: str  # for captions

    def variables(self) -> dict:
        return self.values


class EvaluationData:
    """The images that evaluators share, and their features, computed once for each state.

    Args:
      bind: variables -> model, a pure function.
      train: images for k-NN and probes to learn from, or None. Both sources are cut to a fixed random subset of
        `evaluate.max_train_examples` and `evaluate.max_examples`.
    """

    # Device batches {"feature", "label", "weight"} of the evaluation images, if the outputs of a frozen encoder
    # (`Classifier.represent`) are cached.
    kept_batches: Callable[[], Iterator[dict]] | None = None

    def __init__(
        self, config: ConfigDict, bind: Callable[[dict], Any], mesh: Mesh, train: Source | None, evaluation: Source
    ):
        self.config, self.bind, self.mesh = config, bind, mesh
        self.model = MAEConfig(**config.model)
        settings = config.evaluate
        self.train = train and RandomSubset(train, settings.max_train_examples or len(train))
        self.evaluation = RandomSubset(evaluation, settings.max_examples or len(evaluation))
        self._encode_rows = on_rows(self._encode, mesh)
        self._state, self._features = None, {}

    @functools.cached_property
    def hidden_patches(self) -> HiddenPatches:
        """The masks of the evaluation images: the same in every evaluation."""
        return HiddenPatches(self.config, self.model, len(self.evaluation))

    @property
    def labelled(self) -> bool:
        """Whether there are training images and classes, so that features can be measured."""
        return self.train is not None and min(self.train.num_classes, self.evaluation.num_classes) > 1

    @property
    def description(self) -> str:
        """The features and the images, in words."""
        token = "the class token" if self.config.evaluate.token == "class" else "mean of the patch tokens"
        return f"features: {token} after the final norm, {count_images(self.train, self.evaluation)}, centre crops"

    def batches(self, source: Source) -> Iterator[dict]:
        """Device batches {"image" uint8, "label", "index", "weight"}; rows of weight 0 are padding."""
        size, model = self.config.evaluate.batch_size, self.model
        return evaluation_batches(source, self.config.data, size, model.image_size, model.channels, self.mesh)

    def normalize(self, images: jax.Array) -> jax.Array:
        """Images [B, H, W, C] from uint8 to the model's range."""
        return normalize(images, self.config.data.mean, self.config.data.std)

    def features(self, state: State, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] (float32) and labels [N] (int64) of a split, "train" or "evaluation"; cached."""
        if self._state is not state:
            self._state, self._features = state, {}
        if split not in self._features:
            self._features[split] = self.extract(state, getattr(self, split))
        return self._features[split]

    def extract(self, state: State, source: Source, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels of any source, not cached; see `extract_features`."""
        feature_fn = functools.partial(self._encode_rows, state.variables())
        return extract_features(feature_fn, self.batches(source), len(source), out)

    def forget(self) -> None:
        """Drops the cached features and their state."""
        self._state, self._features = None, {}

    def _encode(self, variables: dict, batch: dict) -> jax.Array:
        tokens = self.bind(variables).encode(self.normalize(batch["image"]))
        return pool(tokens, self.config.evaluate.token, self.model.class_tokens)


class Evaluator:
    """One measurement of a model: the base class, also for evaluators of your own."""

    measures_features = False  # whether it measures frozen features; if so, a random encoder is measured too
    protocol = ""  # how it measures, in words

    def __init__(self, config: ConfigDict, data: EvaluationData):
        self.config, self.data = config, data

    def run(self, state: State) -> Iterator[tuple[str, float | np.ndarray]]:
        """Yields (name, value): a number, or a picture uint8 [height, width, 3]."""
        raise NotImplementedError
