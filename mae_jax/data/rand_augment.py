"""RandAugment on the host: a few random operations of Pillow on each picture (Cubuk et al. 2019, arXiv 1909.13719).

The variant is the one known as `rand-m9-mstd0.5-inc1`, which the fine-tuning recipe of the paper uses: 15 operations
whose effect grows with the magnitude, and a magnitude that varies a little from operation to operation.
"""

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

from mae_jax.runtime.errors import UserError

MAX_MAGNITUDE = 10.0
APPLY_PROBABILITY = 0.5  # of an operation that was drawn
MAX_DEGREES = 30.0  # what magnitude 10 stands for, here and below
MAX_SHEAR = 0.3  # pixels a pixel
MAX_TRANSLATION = 0.45  # of the side
MAX_ENHANCEMENT = 0.9  # distance of the factor from 1
MAX_ADDED = 110  # grey levels

Fill = int | tuple[int, ...]  # the colour of what comes in from outside the picture
# (picture, level in [0, 1], sign, fill) -> picture
Operation = Callable[[Image.Image, float, int, Fill], Image.Image]


def _auto_contrast(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.equalize(picture)


def _invert(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.invert(picture)


def _rotate(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return picture.rotate(sign * level * MAX_DEGREES, Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    # 4 bits of a value are kept, down to none, where all is black; ImageOps.posterize refuses to keep none.
    dropped = 8 - (4 - int(level * 4))
    return picture.point([value >> dropped << dropped for value in range(256)] * len(picture.getbands()))


def _solarize(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.solarize(picture, 256 - int(level * 256))  # what is at least as bright is inverted


def _solarize_add(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    added = int(level * MAX_ADDED)
    table = [value + added if value < 128 else value for value in range(256)]
    return picture.point(table * len(picture.getbands()))


def _enhance(enhancer: type) -> Operation:
    def enhance(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
        return enhancer(picture).enhance(1 + sign * level * MAX_ENHANCEMENT)

    return enhance


def _shear_x(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(picture, (1, sign * level * MAX_SHEAR, 0, 0, 1, 0), fill)


def _shear_y(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(picture, (1, 0, 0, sign * level * MAX_SHEAR, 1, 0), fill)


def _translate_x(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(picture, (1, 0, sign * level * MAX_TRANSLATION * picture.width, 0, 1, 0), fill)


def _translate_y(picture: Image.Image, level: float, sign: int, fill: Fill) -> Image.Image:
    return _affine(picture, (1, 0, 0, 0, 1, sign * level * MAX_TRANSLATION * picture.height), fill)


def _affine(picture: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """Row-wise `matrix` maps a place of the result to the place of `picture` that is shown there, corner to corner."""
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
_NAMES = tuple(OPERATIONS)


def apply_operation(name: str, image: np.ndarray, level: float, sign: int, fill: tuple[int, ...]) -> np.ndarray:
    """Applies one of OPERATIONS.

    Args:
      name: its key.
      image: uint8 [h, w, c], c 1 or 3.
      level: strength in [0, 1]; some operations have none.
      sign: 1 or -1: direction of a movement, more or less of a colour.
      fill: c grey levels.

    Returns:
      uint8 [h, w, c].
    """
    grey = image.shape[2] == 1
    picture = Image.fromarray(image[:, :, 0] if grey else image)
    picture = OPERATIONS[name](picture, level, sign, fill[0] if grey else fill)
    return np.asarray(picture).reshape(image.shape)


class RandAugment:
    """Applies random operations to a picture: (uint8 [h, w, c], generator) -> uint8 [h, w, c].

    Args:
      ops: operations drawn for a picture, with replacement; each is applied with probability APPLY_PROBABILITY.
      magnitude: mean of the strength of an operation, in [0, MAX_MAGNITUDE], and
      magnitude_std: its standard deviation; what lies outside [0, MAX_MAGNITUDE] is clipped.
      fill: c grey levels (0..255) for what comes in from outside the picture; c must be 1 or 3.

    Raises:
      UserError: another number of channels.
    """

    def __init__(self, ops: int, magnitude: float, magnitude_std: float, fill: tuple[int, ...]):
        if len(fill) not in (1, 3):
            raise UserError(
                f"model.channels={len(fill)}: data.augmentation=rand_augment works on 1 or 3 channels; "
                "set data.augmentation=none"
            )
        self._ops, self._magnitude, self._magnitude_std, self._fill = ops, magnitude, magnitude_std, tuple(fill)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for _ in range(self._ops):
            # Always all of the draws, so that one operation's do not depend on what came before.
            name = _NAMES[rng.integers(len(_NAMES))]
            applied = rng.random() < APPLY_PROBABILITY
            magnitude = min(max(rng.normal(self._magnitude, self._magnitude_std), 0.0), MAX_MAGNITUDE)
            sign = 1 if rng.random() < 0.5 else -1
            if applied:
                image = apply_operation(name, image, magnitude / MAX_MAGNITUDE, sign, self._fill)
        return image


def make_augmentation(data_config: ConfigDict, channels: int) -> RandAugment | None:
    """What the settings do to each cropped picture of `channels`; None: nothing.

    Raises:
      UserError: as RandAugment; ValueError: an unknown data.augmentation.
    """
    match data_config.augmentation:
        case "none":
            return None
        case "rand_augment":
            mean = tuple(data_config.mean)
            mean = mean * channels if len(mean) == 1 else mean
            return RandAugment(
                data_config.rand_augment_ops,
                data_config.rand_augment_magnitude,
                data_config.rand_augment_magnitude_std,
                fill=tuple(min(max(round(255 * value), 0), 255) for value in mean),
            )
        case name:
            raise ValueError(f"data.augmentation={name!r} is not one of none, rand_augment")
