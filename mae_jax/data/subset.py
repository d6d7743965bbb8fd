"""Parts of a source, and a source whose labels can be relied on."""

import contextlib

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.listing import first_few
from mae_jax.data.sources import Source
from mae_jax.runtime.errors import UserError


class Wrapper:
    """A source that offers what another one does; those below change a part of it."""

    def __init__(self, source: Source):
        self._source = source
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.in_memory, self.picture_size = source.in_memory, source.picture_size
        self.place, self.notes = source.place, source.notes

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        return self._source[index]

    def labels(self) -> np.ndarray:
        """int64 [n]: the labels of all examples, -1: none."""
        return self._source.labels()

    def name_of(self, index: int) -> str:
        return self._source.name_of(index)


class _Subset(Wrapper):
    """The examples of a source at `indices` (int [n]), in the source's order.

    Attributes:
      indices: int [n], sorted.
    """

    def __init__(self, source: Source, indices: np.ndarray):
        super().__init__(source)
        self.indices = np.sort(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return super().__getitem__(int(self.indices[index]))

    def labels(self) -> np.ndarray:
        return super().labels()[self.indices]

    def name_of(self, index: int) -> str:
        return super().name_of(int(self.indices[index]))


class RandomSubset(_Subset):
    """`count` examples of a source, the same random ones each time, in the source's order; all if it has no more."""

    def __init__(self, source: Source, count: int, seed: int = 0):
        super().__init__(source, np.random.default_rng(seed).permutation(len(source))[:count])


class StratifiedSubset(_Subset):
    """The same share of each class of a source, the same random examples each time, in the source's order.

    Args:
      source: labelled.
      fraction: share in (0, 1] of each class; its count is rounded, but at least 1.
      seed: of the choice.

    Raises:
      UserError: the source has no labels.
    """

    def __init__(self, source: Source, fraction: float, seed: int = 0):
        if source.num_classes < 2:
            raise UserError(
                f"data.label_fraction={fraction} takes a share of each class, but the pictures have no labels: "
                "leave it unset, or use labelled data"
            )
        labels, rng = source.labels(), np.random.default_rng(seed)
        chosen = []
        for label in np.unique(labels):  # -1 too, where labels are missing: to refuse it is Labelled's matter
            members = np.flatnonzero(labels == label)
            chosen.append(rng.permutation(members)[: max(1, round(fraction * len(members)))])
        super().__init__(source, np.concatenate(chosen))


class MatchedClasses(Wrapper):
    """A source with labels that are places in `class_names`, among which its own names are."""

    def __init__(self, source: Source, class_names: list[str]):
        super().__init__(source)
        self.num_classes, self.class_names = len(class_names), class_names
        self._places = np.array([*(class_names.index(name) for name in source.class_names), -1])  # -1 stays what it is

    def __getitem__(self, index: int) -> dict:
        record = super().__getitem__(index)
        return record | {"label": int(self._places[record["label"]])}

    def labels(self) -> np.ndarray:
        return self._places[super().labels()]


def match_classes(source: Source, class_names: list[str], whose: str) -> Source:
    """The source with its classes matched to others by their names; the same one if it has no names.

    Raises:
      UserError: for a class that is not among `class_names`, those of `whose`.
    """
    found = source.class_names
    if not found or list(found) == list(class_names):
        return source
    if unknown := [name for name in found if name not in class_names]:
        others = f" ({len(unknown):,} such)" if len(unknown) > 1 else ""
        raise UserError(
            f"the pictures have the class {unknown[0]!r}{others}, which {whose} does not have: it has "
            f"{first_few([repr(name) for name in class_names])}"
        )
    return MatchedClasses(source, list(class_names))


class Labelled(Wrapper):
    """A source for tasks that need labels: checks that there are classes, and each label as it is read.

    Args:
      source: to check.
      data_config: the group `data` that it was made from, for messages.

    Raises:
      UserError: at once, if there are fewer than 2 classes; on reading, for a label outside [0, num_classes). The first
        example is read at once, since of some splits no label is known.
    """

    def __init__(self, source: Source, data_config: ConfigDict):
        if source.num_classes < 2:
            raise UserError(_no_labels(source, data_config))
        super().__init__(source)
        with contextlib.suppress(OSError):  # a file that cannot be read is the loader's affair
            self[0]

    def __getitem__(self, index: int) -> dict:
        record = super().__getitem__(index)
        if not 0 <= record["label"] < self.num_classes:
            raise UserError(
                f"{self.name_of(index)} has the label {record['label']}, which is outside [0, {self.num_classes}): "
                "choose a split whose pictures are all labelled"
            )
        return record


def _no_labels(source: Source, data_config: ConfigDict) -> str:
    found = f"the pictures, such as {source.name_of(0)}, "
    found += "are all of one class" if source.num_classes else "have no labels"
    if data_config.name == "image_folder":
        return (
            f"data.path={data_config.path}: {found}, but this task needs classes: put those of each class into a "
            "folder of its own (train/cat/1.jpg, train/dog/1.jpg, ...)"
        )
    return f"data.name={data_config.name}: {found}, but this task needs classes: choose labelled data"
