"""Shared by k-NN, logistic regression and features: a checkpoint's encoder and the images to measure it on."""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.sources import Labelled, Source, StratifiedSubset, make_source, make_sources, match_classes
from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.unseen import find_training_pictures
from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import MAEConfig
from mae_jax.models.mae import init_params, make_bind
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import create
from mae_jax.runtime.seeds import make_key
from mae_jax.tasks.measuring import open_checkpoint, open_data, write_config


def open_encoder(config: ConfigDict, workdir: Path, *, labelled: bool = True) -> tuple[EvaluationData, Trained]:
    """The images and a checkpoint's weights; for `labelled` see `find_sources`."""
    weights, config = open_checkpoint(config, workdir)
    data, state = open_data(weights, config, *find_sources(weights, config, labelled=labelled))
    write_config(workdir, config)
    return data, state


def with_random_encoder(data: EvaluationData) -> tuple[EvaluationData, Trained]:
    """The same images, and a randomly initialised encoder of the same size."""
    data.forget()
    params = create(functools.partial(init_params, data.model), make_key(data.config.seed, "init"), data.mesh)
    bind = make_bind(data.model)
    return EvaluationData(data.config, bind, data.mesh, data.train, data.evaluation), Trained(0, params, "random")


def find_sources(
    weights: Weights, config: ConfigDict, *, to_train: bool = True, labelled: bool = False
) -> tuple[Source | None, Source]:
    """Training images, or None without `to_train` or if there are none, and evaluation images.

    `labelled`: training images are required, and both must have labels.
    """
    model, data = config.model, config.data
    size = MAEConfig(**model).image_size
    if not to_train:
        return None, make_source(data, "eval", size, model.channels)
    try:
        train, evaluation = make_sources(data, size, model.channels)
    except NothingToTrainOn:
        train, evaluation = None, make_source(data, "eval", size, model.channels)
        if labelled:
            train, evaluation = find_training_pictures(weights, config, evaluation)
            say("note: the training images are those of the checkpoint's own data")
        elif data.label_fraction is not None:
            raise UserError(
                f"data.label_fraction={data.label_fraction} takes a share of the pictures to learn from, and "
                f"data.path={data.path} has none: leave it out"
            ) from None
        elif (names := weights.config.get("class_names")) and weights.config["data"]["name"]:
            evaluation = match_classes(evaluation, list(names), config.init_from)
    if labelled:
        train, evaluation = Labelled(train, data), Labelled(evaluation, data)
    if data.label_fraction is not None:
        train = StratifiedSubset(train, data.label_fraction, data.seed)
    return train, evaluation
