"""RandAugment on the host: random Pillow operations on each picture (Cubuk et al. 2019, arXiv 1909.13719).

The variant is `rand-m9-mstd0.5-inc1` of MAE's fine-tuning recipe: all effects grow with the magnitude.
"""

import functools
from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

from mae_jax.data.transforms import Augment

MAX_MAGNITUDE = 10.0
APPLY_PROBABILITY = 0.5  # of a drawn operation
MAX_DEGREES = 30.0  # at magnitude 10, like those below
MAX_SHEAR = 0.3  # pixels per pixel
MAX_SHIFT = 0.45  # of the side
MAX_ENHANCEMENT = 0.9  # distance of the factor from 1
MAX_ADDED = 110  # grey levels

BICUBIC = Image.Resampling.BICUBIC
Fill = int | tuple[int, ...]  # the colour of areas from outside the picture
# (picture, strength in [-1, 1], fill) -> picture; the sign, if it matters, is a direction, or more or less colour.
Operation = Callable[[Image.Image, float, Fill], Image.Image]


def _posterize(picture: Image.Image, strength: float, fill: Fill) -> Image.Image:
    # Keeps 4 bits of a value down to none (all black), which ImageOps.posterize refuses.
    dropped = 4 + int(abs(strength) * 4)
    return picture.point([value >> dropped << dropped for value in range(256)] * len(picture.getbands()))


def _solarize_add(picture: Image.Image, strength: float, fill: Fill) -> Image.Image:
    added = int(abs(strength) * MAX_ADDED)
    table = [value + added if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _enhance(enhancer: type) -> Operation:
    return lambda picture, strength, fill: enhancer(picture).enhance(1 + strength * MAX_ENHANCEMENT)


def _affine(picture: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """`matrix`, row by row, maps coordinates in the result to those in `picture`, both from the top left corner."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=fill)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda picture, s, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, s, fill: ImageOps.equalize(picture),
    "invert": lambda picture, s, fill: ImageOps.invert(picture),
    "rotate": lambda picture, s, fill: picture.rotate(s * MAX_DEGREES, BICUBIC, fillcolor=fill),
    "posterize": _posterize,
    # Inverts values from the threshold up.
    "solarize": lambda picture, s, fill: ImageOps.solarize(picture, 256 - int(abs(s) * 256)),
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": lambda picture, s, fill: _affine(picture, (1, s * MAX_SHEAR, 0, 0, 1, 0), fill),
    "shear_y": lambda picture, s, fill: _affine(picture, (1, 0, 0, s * MAX_SHEAR, 1, 0), fill),
    "translate_x": lambda picture, s, fill: _affine(picture, (1, 0, s * MAX_SHIFT * picture.width, 0, 1, 0), fill),
    "translate_y": lambda picture, s, fill: _affine(picture, (1, 0, 0, 0, 1, s * MAX_SHIFT * picture.height), fill),
}


def apply_operation(name: str, image: np.ndarray, level: float, sign: int, fill: tuple[int, ...]) -> np.ndarray:
    """Applies one of OPERATIONS to uint8 [h, w, c], c 1 or 3: level in [0, 1], sign 1 or -1, fill of c grey levels."""
    grey = image.shape[2] == 1
    picture = Image.fromarray(image[:, :, 0] if grey else image)
    picture = OPERATIONS[name](picture, sign * level, fill[0] if grey else fill)
    return np.asarray(picture).reshape(image.shape)


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, ops: int, magnitude: float, std: float, fill: tuple[int, ...]
) -> np.ndarray:
    """Applies each of `ops` random operations with APPLY_PROBABILITY to uint8 [h, w, c]; c is 1 or 3.

    Their strengths have the mean `magnitude` and the standard deviation `std`, clipped to [0, MAX_MAGNITUDE]; `fill`
    has c grey levels (0..255) for areas from outside the picture.
    """
    names = tuple(OPERATIONS)
    for _ in range(ops):
        # Always draws everything, so an operation's draws do not depend on those before it.
        name = names[rng.integers(len(names))]
        applied = rng.random() < APPLY_PROBABILITY
        strength = min(max(rng.normal(magnitude, std), 0.0), MAX_MAGNITUDE)
        sign = 1 if rng.random() < 0.5 else -1
        if applied:
            image = apply_operation(name, image, strength / MAX_MAGNITUDE, sign, fill)
    return image


def make_augmentation(data: ConfigDict, channels: int) -> Augment | None:
    """The augmentation of cropped pictures, if any."""
    if data.augmentation == "none":
        return None
    mean = tuple(data.mean) * (channels if len(data.mean) == 1 else 1)
    fill = tuple(min(max(round(255 * value), 0), 255) for value in mean)
    ops, magnitude, std = data.rand_augment_ops, data.rand_augment_magnitude, data.rand_augment_magnitude_std
    return functools.partial(rand_augment, ops=ops, magnitude=magnitude, std=std, fill=fill)
