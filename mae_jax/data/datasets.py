"""Opens the data set that `data.name` names."""

from ml_collections import ConfigDict

import mae_jax.data.image_folder  # noqa: F401 (registers it)
from mae_jax.data.sources import SOURCES, Source
from mae_jax.data.subset import match_classes
from mae_jax.data.tfds_source import TfdsSource


def make_source(data: ConfigDict, split: str, image_size: tuple[int, int], channels: int) -> Source:
    """Opens one split, "train" or "eval". UserError if the data are missing or differ from the settings `data.*`."""
    return _find(data.name)(split, data, image_size, channels)


def make_sources(data: ConfigDict, image_size: tuple[int, int], channels: int) -> tuple[Source, Source]:
    """Opens both splits, with the same classes behind the labels. UserError also if training lacks a class."""
    train, evaluation = _find(data.name).open_both(data, image_size, channels)
    return train, match_classes(evaluation, train.class_names or (), f"the training data {train.place}")


def _find(name: str) -> type[Source]:
    """A registered class, or an imported "module:Class"; other names, such as "imagenet2012:5.1.0", are TFDS's."""
    own = name in SOURCES or name.partition(":")[2].isidentifier()
    return SOURCES.find(name) if own else TfdsSource
