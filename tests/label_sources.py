"""Sources whose labels are of other kinds than class, made from scikit-learn's digits; fast to read."""

import numpy as np

from mae_jax.data.sources import Digits, Source

SIZES = {"train": 96, "eval": 40}  # neither batches nor devices divide the latter


class Several(Source):
    """Digits with three labels of which any apply."""

    label_kind, class_names = "multi", ["odd", "small", "prime"]
    picture_size, in_memory = (8, 8), True

    def __init__(self, split, *others):
        digits = Digits(split)
        found = [digits[index] for index in range(SIZES[split])]
        self._images = [record["image"] for record in found]
        self._labels = self.label_of(np.array([record["label"] for record in found]), np.stack(self._images))
        self.place = f"in digits {split}"

    def label_of(self, digit, images):
        return np.stack([digit % 2 == 1, digit < 4, np.isin(digit, (2, 3, 5, 7))], axis=1).astype(np.float32)

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return {"image": self._images[index], "label": self._labels[index]}

    def labels(self):
        return self._labels


class Numbers(Several):
    """Digits with the mean of their pixels, in hundreds around 2000, and with the digit itself."""

    label_kind, class_names = "number", ["ink", "digit"]

    def label_of(self, digit, images):
        return np.stack([2000 + 10 * images.mean(axis=(1, 2, 3)), digit], axis=1).astype(np.float32)
