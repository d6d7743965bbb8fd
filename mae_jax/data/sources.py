"""Sources: their interface, the registry of data sets, parts of a source, and two that need no files."""

import contextlib
import functools
from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import first_few
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.settings.registry import Registry

# Name -> class, called with (split, data, image_size, channels); see `Source`.
SOURCES: Registry[type["Source"]] = Registry("data.name")
SOURCES["image_folder"] = "mae_jax.data.image_folder:ImageFolder"
SOURCES["prepared"] = "mae_jax.data.prepared:Prepared"
SOURCES["table"] = "mae_jax.data.table:Table"
SOURCES["parquet"] = "mae_jax.data.parquet:Parquet"
SOURCES["webdataset"] = "mae_jax.data.webdataset:WebDataset"


class Source:
    """Pictures and labels of one split, by index. A data set implements `__len__` and `__getitem__` at least.

    `Class(split, data, image_size, channels)` makes it: "train" or "eval", the settings `data.*`, the model's (height,
    width) and channels, which pictures need not have. Reader processes get a pickled copy.
    """

    label_kind = "class"  # class: one of several | multi: any of several | number: values to predict
    class_names: Sequence[str] | None = None  # of the labels 0, 1, ..., or of the numbers; None: no labels
    picture_size: tuple[int, int] | None = None  # (height, width) in pixels, if all pictures have one size
    in_memory = False  # whether reading never waits
    knows_labels = False  # whether `labels` reads no pictures
    place = ""  # where the pictures are: "in FOLDER/validation", "in cifar10 test"
    notes: Sequence[str] = ()  # lines for users; the evaluation split has those of both splits

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        """{"image": [h, w, c] or the bytes of a file, "label": see `labels`}; an OSError means a bad picture."""
        raise NotImplementedError

    @functools.cached_property
    def num_classes(self) -> int:
        return len(self.class_names or ())

    def labels(self) -> np.ndarray:
        """Labels of all pictures. Override it if they are known without reading the pictures.

        Of the kind class int64 [n], -1: none. Else float32 [n, num_classes], NaN: none; of the kind multi 1 for a class
        that applies, else 0.
        """
        found = no_labels(self, len(self))
        for index in range(len(self) if self.num_classes else 0):
            found[index] = self[index]["label"]
        return found

    def name_of(self, index: int) -> str:
        """The name of a picture, for messages."""
        return f"{self.place.removeprefix('in ')} #{index}".strip()

    def file_of(self, index: int) -> str:
        """The file of a picture, or else its name: for tables to join with others."""
        return self.name_of(index)

    def digest(self) -> str | None:
        """Of all pictures, or their names, in their order: a run resumes only with the same. None: not checked."""
        return None

    @classmethod
    def open_both(cls, data: ConfigDict, image_size: tuple[int, int], channels: int) -> tuple["Source", "Source"]:
        """The splits "train" and "eval"."""
        return cls("train", data, image_size, channels), cls("eval", data, image_size, channels)


def no_labels(source: Source, count: int) -> np.ndarray:
    """`Source.labels` of so many pictures without any."""
    if getattr(source, "label_kind", "class") == "class":
        return np.full(count, -1, np.int64)
    return np.full((count, source.num_classes), np.nan, np.float32)


def is_labelled(source: Source) -> bool:
    """Whether there is something to tell apart or to predict: two classes, or one number."""
    return source.num_classes >= (1 if source.label_kind == "number" else 2)


def make_source(data: ConfigDict, split: str, image_size: tuple[int, int], channels: int) -> Source:
    """Opens one split, "train" or "eval". UserError if the data are missing or differ from the settings `data.*`."""
    return _find(data.name)(split, data, image_size, channels)


def make_sources(data: ConfigDict, image_size: tuple[int, int], channels: int) -> tuple[Source, Source]:
    """Opens both splits, with the same classes behind the labels. UserError also if training lacks a class."""
    train, evaluation = _find(data.name).open_both(data, image_size, channels)
    return train, match_classes(evaluation, train.class_names or (), f"the training data {train.place}")


def _find(name: str) -> type[Source]:
    """A registered or imported class. Other names, such as "imagenet2012:5.1.0", are TFDS's."""
    own = name in SOURCES or name.partition(":")[2].isidentifier()
    return SOURCES.find(name if own else "mae_jax.data.tfds_source:TfdsSource")


def describe_sources(name: str, train: Source | None, evaluation: Source) -> list[str]:
    """Lines for users: the numbers of pictures, where they are, and notes. Without training, `train` is None."""
    return [escaped(line) for line in (f"{name}: {count_images(train, evaluation)}", *evaluation.notes)]


def count_images(train: Source | None, evaluation: Source) -> str:
    """Numbers of pictures per split: "9 training images in F/train, 1 evaluation image in F/val", for example."""
    parts = [(source, kind) for source, kind in ((train, "training"), (evaluation, "evaluation")) if source]
    told = [f"{len(source):,} {kind} image{'s' * (len(source) != 1)} {source.place}".rstrip() for source, kind in parts]
    return escaped(", ".join(told))


class Wrapper(Source):
    """A source with the properties of another; its pictures, or those at `indices` (int [n]), in its order."""

    def __init__(self, source: Source, indices: np.ndarray | None = None):
        self._source = source
        self.indices = np.arange(len(source)) if indices is None else np.sort(indices)
        for name in ("label_kind", "class_names", "num_classes", "picture_size", "in_memory", "knows_labels", "place",
                     "notes"):  # fmt: skip
            setattr(self, name, getattr(source, name))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[int(self.indices[index])]

    def labels(self) -> np.ndarray:
        return self._source.labels()[self.indices]

    def name_of(self, index: int) -> str:
        return self._source.name_of(int(self.indices[index]))

    def file_of(self, index: int) -> str:
        return self._source.file_of(int(self.indices[index]))

    def digest(self) -> str | None:
        return self._source.digest()


def random_subset(source: Source, count: int) -> Wrapper:
    """At most `count` random pictures, always the same."""
    return Wrapper(source, np.random.default_rng(0).permutation(len(source))[:count])


def stratified_subset(source: Source, fraction: float, seed: int = 0) -> Wrapper:
    """A random share of each class, at least 1 picture; the same for the same seed. UserError without labels.

    Of labels of another kind than class: a random share of all pictures.
    """
    if not is_labelled(source):
        raise UserError(f"data.label_fraction={fraction}, but pictures have no labels: leave it unset")
    rng = np.random.default_rng(seed)
    if source.label_kind != "class":
        return Wrapper(source, rng.permutation(len(source))[: max(1, round(fraction * len(source)))])
    return Wrapper(source, some_of_each_class(source.labels(), lambda count: max(1, round(fraction * count)), rng))


def some_of_each_class(labels: np.ndarray, how_many: Callable[[int], int], rng: np.random.Generator) -> np.ndarray:
    """Random places of the labels [n]: of each class, `how_many` of its number of examples, or all if that is more."""
    members = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    return np.concatenate([m[: how_many(len(m))] for m in members])


class MatchedClasses(Wrapper):
    """A source with its labels renumbered to index `class_names`, which contain its own."""

    def __init__(self, source: Source, class_names: Sequence[str]):
        super().__init__(source)
        self.class_names, self.num_classes = list(class_names), len(class_names)
        self._places = np.array([*map(self.class_names.index, source.class_names), -1])  # -1 stays -1

    def __getitem__(self, index: int) -> dict:
        record = super().__getitem__(index)
        return record | {"label": self._renumbered(np.asarray(record["label"]))}

    def labels(self) -> np.ndarray:
        return self._renumbered(super().labels())

    def _renumbered(self, labels: np.ndarray) -> np.ndarray:
        if self.label_kind == "class":
            return self._places[labels]
        found = np.zeros((*labels.shape[:-1], self.num_classes), np.float32)
        found[..., self._places[:-1]] = labels
        return found


def match_classes(source: Source, class_names: Sequence[str], whose: str) -> Source:
    """The source, its labels renumbered by name to index `class_names` of `whose`; UserError for any other class."""
    found = source.class_names
    if not found or list(found) == list(class_names):
        return source
    if source.label_kind == "number" and set(found) != set(class_names):
        raise UserError(
            f"the pictures {source.place} have the numbers {first_few(list(found))}, but {whose} has "
            f"{first_few(list(class_names))}: set data.label_column"
        )
    if unknown := [repr(name) for name in found if name not in set(class_names)]:
        raise UserError(
            f"the pictures {source.place} have the class {first_few(unknown)}, which {whose} does not have: it has "
            f"{first_few(list(map(repr, class_names))) or 'none'}"
        )
    return MatchedClasses(source, class_names)


class Labelled(Wrapper):
    """A source that checks labels on reading; UserError for fewer than 2 classes or a label outside them."""

    def __init__(self, source: Source, data: ConfigDict):
        if not is_labelled(source):
            found = "are all of one class" if source.num_classes else "have no labels"
            raise UserError(
                f"data.name={data.name}, data.path={data.path}: the pictures, such as {source.name_of(0)}, {found}: "
                "choose labelled data, or put each class into a folder of its own (train/cat/1.jpg, ...)"
            )
        super().__init__(source)
        if source.knows_labels:
            self._check_all(source.labels())
        else:
            with contextlib.suppress(OSError):  # the loader deals with bad pictures
                self[0]  # a split may have no labels at all

    def _check_all(self, labels: np.ndarray) -> None:
        """UserError, before any training, if a picture has no label."""
        lacking = labels < 0 if self.label_kind == "class" else np.isnan(labels).any(1)
        if lacking.any():
            raise UserError(
                f"{self.name_of(int(np.argmax(lacking)))} has no label; {lacking.sum():,} of {len(self):,} pictures "
                "have none: choose a split whose pictures are all labelled, or remove the others"
            )

    def __getitem__(self, index: int) -> dict:
        record = super().__getitem__(index)
        if self.label_kind != "class":
            if not np.isfinite(record["label"]).all():
                raise UserError(f"{self.name_of(index)} has no label: choose a split whose pictures are all labelled")
        elif not 0 <= record["label"] < self.num_classes:
            raise UserError(
                f"{self.name_of(index)} has the label {record['label']}, which is outside [0, {self.num_classes}): "
                "choose a split whose pictures are all labelled"
            )
        return record


@SOURCES.register("digits")
class Digits(Source):
    """scikit-learn's 1797 handwritten digits, grey, 8 x 8 pixels; 80 % of each class are for training."""

    class_names = [str(digit) for digit in range(10)]
    picture_size = (8, 8)
    in_memory = True

    def __init__(self, split: str, *others):
        from sklearn.datasets import load_digits  # imported here, since it takes a second
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        rows = parts[0 if split == "train" else 1]
        self.place = f"in digits {split}"
        self._images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)[..., None]  # values are 0..16
        self._labels = digits.target[rows].tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._images[index], "label": self._labels[index]}


@SOURCES.register("synthetic")
class Synthetic(Source):
    """`data.num_examples` noisy gratings, with the orientation as the class; each depends on its index alone."""

    class_names = [f"grating_{18 * label}_degrees" for label in range(10)]

    def __init__(self, split: str, data: ConfigDict, image_size: tuple[int, int], channels: int):
        if data.num_examples < 4:
            raise UserError(f"data.num_examples={data.num_examples} is too few: set it to 4 or more")
        self._length = data.num_examples if split == "train" else data.num_examples // 4
        self._split, self.place = split, f"in synthetic {split}"
        self._shape = (*image_size, channels)
        self.picture_size = tuple(image_size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self._length:
            raise IndexError(index)
        label = index % self.num_classes
        rng = np.random.Generator(np.random.Philox(key=index, counter=[0, 0, 0, self._split == "eval"]))
        height, width, channels = self._shape
        angle = np.pi * label / self.num_classes
        cycles = rng.uniform(2.5, 3.5)  # across the shorter side
        across = np.cos(angle) * np.arange(width) + np.sin(angle) * np.arange(height)[:, None]
        wave = np.sin(2 * np.pi * (cycles * across / min(height, width) + rng.uniform()))
        contrast = rng.uniform(40, 80, channels)
        image = 127.5 + contrast * wave[..., None] + 24.0 * rng.standard_normal(self._shape, np.float32)
        return {"image": np.clip(np.round(image), 0, 255).astype(np.uint8), "label": label}

    def labels(self) -> np.ndarray:
        return np.arange(self._length, dtype=np.int64) % self.num_classes
