"""Subsets of a source, and sources with renumbered or checked labels."""

import contextlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import first_few
from mae_jax.data.sources import Source
from mae_jax.runtime.errors import UserError


class Wrapper(Source):
    """A source with the properties of another; its pictures, or those at `indices` (int [n]), in its order."""

    def __init__(self, source: Source, indices: np.ndarray | None = None):
        self._source = source
        self.indices = range(len(source)) if indices is None else np.sort(indices)
        for name in ("class_names", "num_classes", "picture_size", "in_memory", "place", "notes"):
            setattr(self, name, getattr(source, name))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[int(self.indices[index])]

    def labels(self) -> np.ndarray:
        return self._source.labels()[self.indices]

    def name_of(self, index: int) -> str:
        return self._source.name_of(int(self.indices[index]))


class RandomSubset(Wrapper):
    """At most `count` random pictures; the same seed gives the same ones."""

    def __init__(self, source: Source, count: int, seed: int = 0):
        super().__init__(source, np.random.default_rng(seed).permutation(len(source))[:count])


class StratifiedSubset(Wrapper):
    """A random share of each class, at least 1 picture; the same for the same seed. UserError without labels."""

    def __init__(self, source: Source, fraction: float, seed: int = 0):
        if source.num_classes < 2:
            raise UserError(
                f"data.label_fraction={fraction} takes a share of each class, but the pictures have no labels: "
                "leave it unset, or use labelled data"
            )
        labels, rng = source.labels(), np.random.default_rng(seed)
        chosen = []
        for label in np.unique(labels):  # including -1, which `Labelled` refuses
            members = np.flatnonzero(labels == label)
            chosen.append(rng.permutation(members)[: max(1, round(fraction * len(members)))])
        super().__init__(source, np.concatenate(chosen))


class MatchedClasses(Wrapper):
    """A source with its labels renumbered to index `class_names`, which contain its own."""

    def __init__(self, source: Source, class_names: Sequence[str]):
        super().__init__(source)
        self.class_names, self.num_classes = list(class_names), len(class_names)
        self._places = np.array([*map(self.class_names.index, source.class_names), -1])  # -1 stays -1

    def __getitem__(self, index: int) -> dict:
        record = super().__getitem__(index)
        return record | {"label": int(self._places[record["label"]])}

    def labels(self) -> np.ndarray:
        return self._places[super().labels()]


def match_classes(source: Source, class_names: Sequence[str], whose: str) -> Source:
    """The source, its labels renumbered by name to index `class_names`; unchanged if its classes have no names.

    Raises UserError for a class that is not among `class_names`, which the message says are those of `whose`.
    """
    found = source.class_names
    if not found or list(found) == list(class_names):
        return source
    if unknown := [name for name in found if name not in set(class_names)]:
        others = f" ({len(unknown):,} such)" if len(unknown) > 1 else ""
        raise UserError(
            f"the pictures {source.place} have the class {unknown[0]!r}{others}, which {whose} does not have: it has "
            f"{first_few([repr(name) for name in class_names]) or 'none'}"
        )
    return MatchedClasses(source, class_names)


class Labelled(Wrapper):
    """A source that checks labels on reading. UserError for fewer than 2 classes or a label outside [0, num_classes).

    The first picture is read at once: a split may have no labels at all.
    """

    def __init__(self, source: Source, data_config: ConfigDict):
        if source.num_classes < 2:
            raise UserError(_no_labels(source, data_config))
        super().__init__(source)
        with contextlib.suppress(OSError):  # the loader deals with bad pictures
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
