"""What k-NN, logistic regression and features have in common: frozen features of a checkpoint's encoder."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import ml_collections
import numpy as np

from mae_jax.data.sources import Source, make_source
from mae_jax.data.subset import Labelled, RandomSubset, StratifiedSubset
from mae_jax.evaluation.features import FeatureExtractor
from mae_jax.interop.weights import make_bind_of
from mae_jax.mesh import make_mesh
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.seeding import make_key
from mae_jax.tasks.checkpoint import open_checkpoint
from mae_jax.training.reporting import provenance, write_json


class FrozenEncoder:
    """A checkpoint's encoder, and the pictures that it is measured on.

    Raises:
      UserError: without a checkpoint, or for pictures without labels.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path):
        weights, self.config = open_checkpoint(config, workdir)
        config = self.config
        self.model, self.mesh = MAEConfig(**config.model), make_mesh(config.mesh)
        self.step = weights.step
        self._weights = weights
        train, evaluation = (self._source(split) for split in ("train", "eval"))
        if config.data.label_fraction is not None:
            train = StratifiedSubset(train, config.data.label_fraction, config.data.seed)
        settings = config.evaluate
        self.train_source = RandomSubset(train, settings.max_train_examples or len(train))
        self.eval_source = RandomSubset(evaluation, settings.max_examples or len(evaluation))
        write_json(workdir / "config.json", config.to_dict() | provenance())

    def _source(self, split: str) -> Source:
        data = self.config.data
        return Labelled(make_source(data, split, self.model.image_size, self.model.channels), data)

    @property
    def num_classes(self) -> int:
        return self.train_source.num_classes

    def extract(self, source: Source, out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Features [N, D] and labels [N] of a source; into `out`, if given."""
        variables = jax.device_put(self._weights.params)
        return self._extract(make_bind_of(self._weights.config), variables, source, out)

    def extract_random(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """The same of an encoder of this size with random weights."""
        init = jax.jit(functools.partial(init_params, self.model))
        return self._extract(make_bind(self.model), init(make_key(self.config.seed, "init")), source)

    def _extract(self, bind: Callable, variables: dict, source: Source, out: np.ndarray | None = None):
        extractor = FeatureExtractor(bind, self.model, self.config, self.mesh)
        return extractor(variables, source, out)
