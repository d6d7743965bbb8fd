"""Opening the data set that `data.name` names."""

from ml_collections import ConfigDict

import mae_jax.data.image_folder  # noqa: F401  which registers it
from mae_jax.data.sources import SOURCES, Source
from mae_jax.data.subset import match_classes
from mae_jax.data.tfds_source import TfdsSource


def make_source(data: ConfigDict, split: str, image_size: tuple[int, int], channels: int) -> Source:
    """Opens one split, "train" or "eval".

    Args:
      data: the settings `data.*`.
      image_size: the model's (height, width), and
      channels: its channels: those of synthetic pictures; others have their own.

    Raises:
      UserError: if the data are missing or not as the settings say.
    """
    return _find(data.name)(split, data, image_size, channels)


def make_sources(data: ConfigDict, image_size: tuple[int, int], channels: int) -> tuple[Source, Source]:
    """Opens the splits for training and for evaluation, whose labels stand for the same class names.

    Raises:
      UserError: as `make_source`, and for an evaluation class that training lacks.
    """
    train, evaluation = _find(data.name).open_both(data, image_size, channels)
    return train, match_classes(evaluation, train.class_names or (), f"the training data {train.place}")


def _find(name: str) -> type[Source]:
    """A class by its registered name or as "module:Class"; TFDS has names such as "imagenet2012:5.1.0"."""
    own = name in SOURCES or name.partition(":")[2].isidentifier()
    return SOURCES.find(name) if own else TfdsSource
