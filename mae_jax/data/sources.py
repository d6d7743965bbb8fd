"""Sources: the interface of a data set, the registry of data sets, and two that need no files."""

import functools
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from mae_jax.runtime.errors import UserError, escaped
from mae_jax.settings.registry import Registry

# Name -> class, called with (split, data, image_size, channels); see `Source`. Other plain names are TFDS data sets.
SOURCES: Registry[type["Source"]] = Registry("data.name")


class Source:
    """Pictures and labels of one split, by index. A data set implements `__len__` and `__getitem__` at least.

    It is made by `Class(split, data, image_size, channels)`: "train" or "eval"; the settings `data.*`; the model's
    (height, width) and channels, which pictures need not have. Reader processes get a pickled copy.
    """

    class_names: Sequence[str] | None = None  # of the labels 0, 1, ...; None: no labels
    picture_size: tuple[int, int] | None = None  # (height, width) in pixels, if all pictures have one size
    in_memory = False  # whether reading never waits
    place = ""  # where the pictures are: "in FOLDER/validation", "in cifar10 test"
    notes: Sequence[str] = ()  # lines for users; the evaluation split has those of both splits

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict:
        """{"image": uint8 [h, w, c] or the bytes of a file, "label": int, -1: none}; an OSError means a bad picture."""
        raise NotImplementedError

    @functools.cached_property
    def num_classes(self) -> int:
        """0 without labels."""
        return len(self.class_names or ())

    def labels(self) -> np.ndarray:
        """Labels of all pictures, int64 [n], -1: none. Override it if they are known without reading the pictures."""
        found = (self[index]["label"] if self.num_classes else -1 for index in range(len(self)))
        return np.fromiter(found, np.int64, len(self))

    def name_of(self, index: int) -> str:
        """The name of a picture, for messages."""
        return f"{self.place.removeprefix('in ')} #{index}".strip()

    @classmethod
    def open_both(cls, data: ConfigDict, image_size: tuple[int, int], channels: int) -> tuple["Source", "Source"]:
        """The splits "train" and "eval"."""
        return cls("train", data, image_size, channels), cls("eval", data, image_size, channels)


def describe_sources(name: str, train: Source | None, evaluation: Source) -> list[str]:
    """Lines for users: the numbers of pictures, where they are, and notes. Without training, `train` is None."""
    return [escaped(line) for line in (f"{name}: {count_images(train, evaluation)}", *evaluation.notes)]


def count_images(train: Source | None, evaluation: Source) -> str:
    """Numbers of pictures per split: "9 training images in F/train, 1 evaluation image in F/val", for example."""
    parts = [(source, kind) for source, kind in ((train, "training"), (evaluation, "evaluation")) if source]
    told = [f"{len(source):,} {kind} image{'s' * (len(source) != 1)} {source.place}".rstrip() for source, kind in parts]
    return escaped(", ".join(told))


@SOURCES.register("digits")
class Digits(Source):
    """scikit-learn's 1797 handwritten digits, grey, 8 x 8 pixels; 80 % of each class are for training."""

    class_names = [str(digit) for digit in range(10)]
    picture_size = (8, 8)
    in_memory = True

    def __init__(
        self, split: str, data: ConfigDict | None = None, image_size: tuple[int, int] = (8, 8), channels: int = 1
    ):
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
    _NOISE = 24.0  # standard deviation, grey levels

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
        noise = self._NOISE * rng.standard_normal(self._shape, np.float32)
        image = 127.5 + contrast * wave[..., None] + noise
        return {"image": np.clip(np.round(image), 0, 255).astype(np.uint8), "label": label}

    def labels(self) -> np.ndarray:
        return np.arange(self._length, dtype=np.int64) % self.num_classes
