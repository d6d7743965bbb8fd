"""Sources of pictures: random-access objects that give one picture and its label by index.

A source has `len(source)`, `source[i] -> {"image": uint8 [h, w, c] or encoded bytes, "label": int}` (-1: none),
`num_classes` (0: unlabelled), `class_names` (or None), `labels()`, those of all pictures without decoding any, and
`name_of(i)`, what a person would call picture i. `in_memory` and `picture_size` tell how it may be read, `place` and
`notes` what a person should know of it. Sources can be pickled, because reader processes get a copy.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.image_folder import ImageFolder
from mae_jax.data.tfds_source import TfdsSource
from mae_jax.runtime.errors import UserError, escaped


class Source(Protocol):
    """What the loader and the tasks need of a set of pictures."""

    num_classes: int
    class_names: list[str] | None
    in_memory: bool  # no picture has to be waited for
    picture_size: tuple[int, int] | None  # (height, width), if all pictures are known to have one size
    place: str  # where the pictures lie: "in FOLDER/validation", "in cifar10 test"
    notes: Sequence[str]  # what else a person should know, a line each; the evaluation split has those of both

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...

    def labels(self) -> np.ndarray:
        """int64 [n], n = len(self): the labels of all pictures, -1: none."""
        ...

    def name_of(self, index: int) -> str: ...


def make_source(data_config: ConfigDict, split: str, image_size: tuple[int, int], channels: int) -> Source:
    """Opens one split of the data set that the group `data` of the settings names.

    Args:
      data_config: the group `data`.
      split: "train" or "eval".
      image_size: (height, width), and
      channels: of the pictures of the "synthetic" data; other pictures have a size of their own.

    Raises:
      UserError: where the data are missing or not as the settings say.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', not {split!r}")
    match data_config.name:
        case "digits":
            return Digits(split)
        case "synthetic":
            return Synthetic(data_config.num_examples, split, image_size, channels)
        case "image_folder":
            return ImageFolder(
                data_config.path, split, data_config.train_split, data_config.eval_split,
                data_config.eval_fraction, data_config.stratify,
            )  # fmt: skip
        case name:
            key = f"{split}_split"
            return TfdsSource(name, data_config.path, data_config[key], f"data.{key}")


def describe_sources(name: str, train: Source | None, evaluation: Source) -> list[str]:
    """How many pictures are used and where they lie, and what else a person should know of them, a line each.

    Args:
      name: data.name.
      train: None: no training pictures are used.
    """
    return [escaped(line) for line in (f"{name}: {count_images(train, evaluation)}", *evaluation.notes)]


def count_images(train: Source | None, evaluation: Source) -> str:
    """How many images, and in which split or folder: "9 training images in F/train, 1 evaluation image in F/val"."""
    parts = [(source, kind) for source, kind in ((train, "training"), (evaluation, "evaluation")) if source]
    told = [f"{len(source):,} {kind} image{'s' * (len(source) != 1)} {source.place}".rstrip() for source, kind in parts]
    return escaped(", ".join(told))


class Digits:
    """scikit-learn's bundled handwritten digits: 1797 grey pictures of 8x8 pixels, 80 % of each class for training."""

    in_memory = True
    num_classes = 10
    picture_size = (8, 8)
    notes = ()

    def __init__(self, split: str):
        from sklearn.datasets import load_digits  # here, since it takes a second
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0)
        self.class_names = [str(digit) for digit in range(10)]
        self._split, self.place = split, f"in digits {split}"
        rows = parts[0 if split == "train" else 1]
        self._images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)[..., None]  # values are 0..16
        self._labels = digits.target[rows].tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self._images[index], "label": self._labels[index]}

    def labels(self) -> np.ndarray:
        return np.asarray(self._labels, np.int64)

    def name_of(self, index: int) -> str:
        return f"digits {self._split} #{index}"


class Synthetic:
    """Pictures made from their index alone: noisy gratings, whose orientation tells the class."""

    in_memory = False  # making one takes as long as reading one
    num_classes = 10
    notes = ()
    _NOISE = 24.0  # standard deviation, grey levels

    def __init__(self, num_examples: int, split: str, image_size: tuple[int, int], channels: int):
        if num_examples < 4:
            raise UserError(f"data.num_examples={num_examples} is too few: set it to 4 or more")
        self.class_names = [f"grating_{18 * label}_degrees" for label in range(self.num_classes)]
        self._length = num_examples if split == "train" else num_examples // 4
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

    def name_of(self, index: int) -> str:
        return f"synthetic {self._split} #{index}"
