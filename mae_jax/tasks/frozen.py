"""What k-NN, logistic regression and features have in common: frozen features of a checkpoint's encoder."""

import functools
from collections.abc import Callable
from pathlib import Path

import ml_collections
import numpy as np

from mae_jax.data.datasets import make_source, make_sources
from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.sources import describe_sources
from mae_jax.data.subset import Labelled, RandomSubset, StratifiedSubset, match_classes
from mae_jax.evaluation.extraction import FeatureExtractor
from mae_jax.evaluation.unseen import find_training_pictures
from mae_jax.interop.weights import make_bind_of
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import check_heads, create, make_mesh, parameter_shardings, put
from mae_jax.runtime.seeds import make_key
from mae_jax.tasks.measuring import open_checkpoint
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import write_json


class FrozenEncoder:
    """A checkpoint's encoder, and the pictures that it is measured on.

    Args:
      labelled: whether the pictures must have labels, and some of them are to learn from.

    Attributes:
      train_source: None, if they are not labelled and the data hold none to learn from.

    Raises:
      UserError: without a checkpoint, or without the labels or the pictures to learn from that are needed.
    """

    def __init__(self, config: ml_collections.ConfigDict, workdir: Path, labelled: bool = True):
        self._weights, self.config = open_checkpoint(config, workdir)
        config, settings = self.config, self.config.evaluate
        self.model, self.mesh, self.step = MAEConfig(**config.model), make_mesh(config.mesh), self._weights.step
        check_heads(self.mesh, self.model, decoder="decoder" in self._weights.params)
        size, channels = self.model.image_size, self.model.channels
        try:
            train, evaluation = make_sources(config.data, size, channels)
        except NothingToTrainOn:
            train, evaluation = None, make_source(config.data, "eval", size, channels)
            if labelled:
                train, evaluation = find_training_pictures(self._weights, config, evaluation)
                say("note: the training images are those of the checkpoint's own data")
            elif config.data.label_fraction is not None:
                raise UserError(
                    f"data.label_fraction={config.data.label_fraction} takes a share of the pictures to learn from, "
                    f"and data.path={config.data.path} has none: leave it out"
                ) from None
            elif (names := self._weights.config.get("class_names")) and self._weights.config["data"]["name"]:
                evaluation = match_classes(evaluation, list(names), config.init_from)
        if labelled:
            train, evaluation = Labelled(train, config.data), Labelled(evaluation, config.data)
        if config.data.label_fraction is not None:
            train = StratifiedSubset(train, config.data.label_fraction, config.data.seed)
        self.train_source = train and RandomSubset(train, settings.max_train_examples or len(train))
        self.eval_source = RandomSubset(evaluation, settings.max_examples or len(evaluation))
        self.num_classes = evaluation.num_classes
        say(*describe_sources(config.data.name, self.train_source, self.eval_source))
        write_json(workdir / "config.json", config.to_dict() | provenance())

    @functools.cached_property
    def extract(self) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
        """(source, out=None) -> features [N, D] and labels [N] of a source, the features in `out` if it is given."""
        bind = make_bind_of(self._weights)
        return self._extractor(bind, put(self._weights.params, parameter_shardings(self.mesh, self._weights.params)))

    @functools.cached_property
    def extract_random(self) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
        """The same of an encoder of this size with random weights."""
        params = create(functools.partial(init_params, self.model), make_key(self.config.seed, "init"), self.mesh)
        return self._extractor(make_bind(self.model), params)

    def _extractor(self, bind: Callable, variables: dict) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
        return functools.partial(FeatureExtractor(bind, self.model, self.config, self.mesh), variables)
