"""scikit-learn's digits as files, for the tests of tasks that take people's own pictures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digits(root: Path, count: int, folder_of: Callable[[int, int], str]) -> Path:
    """Writes the first `count` digits as PNGs named by their numbers, in folder_of(number, digit); returns root."""
    digits = load_digits()
    for n in range(count):
        file = root / folder_of(n, digits.target[n]) / f"{n:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[n] * 15.9).astype(np.uint8)).save(file)
    return root
