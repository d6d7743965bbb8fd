"""Geometry of uint8 pictures on the host: the random crops of training and the centre crops of evaluation."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # top, left, height, width in pixels

CROP_TRIES = 10  # boxes drawn before falling back on the central one, as in torchvision's RandomResizedCrop
LONGEST = 8  # times the length that the aspect asks for; of longer pictures only the middle is resized
DRAWS_AT_ONCE = 64  # places whose crops are drawn together (20 KB), since making a generator is slow
_NUMBERS = 4  # per try: area, aspect, top, left; as many as Philox makes from one counter value


class Picture(Protocol):
    """What crops are taken from: an array or an encoded picture."""

    height: int
    width: int

    def whole(self) -> np.ndarray:
        """uint8 [h, w, c]."""

    def part(self, box: Box, size: tuple[int, int], exact: bool = True) -> np.ndarray:
        """The box, resized to uint8 [*size, c] by Pillow's antialiasing bicubic filter; if not `exact`, nearly so."""


class Pixels:
    """A picture in memory, uint8 [h, w, c]."""

    def __init__(self, image: np.ndarray):
        self._image = image
        self.height, self.width, _ = image.shape

    def whole(self) -> np.ndarray:
        return self._image

    def part(self, box: Box, size: tuple[int, int], exact: bool = True) -> np.ndarray:
        top, left, height, width = box
        return resize_by_pillow(self._image[top : top + height, left : left + width], size)


# (picture, place in the global order, (height, width)) -> uint8 [height, width, c]
Transform = Callable[[Picture, int, tuple[int, int]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """The transform of training: `random_resized_crop` by draws that depend only on seed and place."""

    scale: tuple[float, float]
    ratio: tuple[float, float]
    seed: int
    rule: str = "retry"

    def __call__(self, picture: Picture, place: int, size: tuple[int, int]) -> np.ndarray:
        run, place_in_run = divmod(place, DRAWS_AT_ONCE)
        draws = _draws_of_run(self.seed, run)[place_in_run]
        return random_resized_crop(picture, draws, size, self.scale, self.ratio, self.rule)


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """The transform of evaluation."""

    eval_crop: float

    def __call__(self, picture: Picture, place: int, size: tuple[int, int]) -> np.ndarray:
        return resize_and_centre_crop(picture, size, self.eval_crop)


@dataclasses.dataclass(frozen=True)
class Augmented:
    """A transform followed by a random change of the crop; the place seeds it."""

    transform: Transform
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray]  # of uint8 [h, w, c]
    seed: int

    def __call__(self, picture: Picture, place: int, size: tuple[int, int]) -> np.ndarray:
        # The 1 keeps this stream apart from that of `crop_draws`, whose counters are below 2^128.
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 1, place]))
        return self.augment(self.transform(picture, place, size), rng)


def crop_draws(seed: int, first: int, count: int) -> np.ndarray:
    """Uniform numbers on [0, 1) for the crops of `count` places from `first` on: float64 [count, CROP_TRIES, 4].

    The four are for a try's area, aspect, top and left. They are counter-based (Philox, Salmon et al. 2011):
    `crop_draws(s, p, n)[i] == crop_draws(s, p + i, 1)[0]`.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=int(first) * CROP_TRIES))
    return generator.random((count, CROP_TRIES, _NUMBERS))


@functools.lru_cache(maxsize=64)  # more than the reading threads
def _draws_of_run(seed: int, run: int) -> np.ndarray:
    return crop_draws(seed, run * DRAWS_AT_ONCE, DRAWS_AT_ONCE)


def sample_crops(
    heights: np.ndarray,
    widths: np.ndarray,
    draws: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rule: str = "retry",
) -> np.ndarray:
    """Boxes int64 [n, 4] (top, left, height, width) of random resized crops, inside n pictures.

    Args:
      heights, widths: of the pictures, int [n], pixels.
      draws: [n, CROP_TRIES, 4]; see `crop_draws`.
      scale: least and greatest share of a picture's area; uniform (Szegedy et al. 2015, arXiv 1409.4842, section 6).
      ratio: least and greatest width / height of a box; log-uniform.
      rule: retry: the first try that fits, else the largest central box with an allowed ratio; clip: the first try, its
        sides clipped to the picture's, as in the linear probe of MAE's authors.
    """
    if rule == "clip":
        first = draws[:, 0]
        box_heights, box_widths = _box_sides(heights, widths, first, scale, ratio)
        box_heights, box_widths = np.clip(box_heights, 1, heights), np.clip(box_widths, 1, widths)
        return _place(heights, widths, box_heights, box_widths, first)
    box_heights, box_widths = _box_sides(heights[:, None], widths[:, None], draws, scale, ratio)
    fits = (box_heights > 0) & (box_widths > 0) & (box_heights <= heights[:, None]) & (box_widths <= widths[:, None])
    chosen = np.arange(len(draws)), fits.argmax(1)  # 0 where none fits
    boxes = _place(heights, widths, box_heights[chosen], box_widths[chosen], draws[chosen])
    none_fits = ~fits[chosen]
    if none_fits.any():
        boxes[none_fits] = _central_boxes(heights[none_fits], widths[none_fits], ratio)
    return boxes


def _box_sides(heights, widths, draws, scale, ratio) -> tuple[np.ndarray, np.ndarray]:
    """Heights and widths (float64, whole pixels) of the boxes of draws [..., 4], whether or not they fit."""
    areas = heights * widths * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspects = np.exp(low + (high - low) * draws[..., 1])
    return np.rint(np.sqrt(areas / aspects)), np.rint(np.sqrt(areas * aspects))


def _place(heights, widths, box_heights, box_widths, draws) -> np.ndarray:
    """Boxes int64 [n, 4] with these sides, placed uniformly by draws [n, 4]."""
    boxes = np.empty((len(draws), 4), np.int64)  # drops the fractions
    boxes[:, 0] = draws[:, 2] * (heights - box_heights + 1)
    boxes[:, 1] = draws[:, 3] * (widths - box_widths + 1)
    boxes[:, 2], boxes[:, 3] = box_heights, box_widths
    return boxes


def _central_boxes(heights, widths, ratio) -> np.ndarray:
    aspects = np.clip(widths / heights, *ratio)
    box_heights = np.minimum(heights, np.maximum(1, np.rint(widths / aspects)))
    box_widths = np.minimum(widths, np.maximum(1, np.rint(heights * aspects)))
    boxes = [(heights - box_heights) // 2, (widths - box_widths) // 2, box_heights, box_widths]
    return np.stack(boxes, axis=1).astype(np.int64)


def random_resized_crop(
    picture: Picture,
    draws: np.ndarray,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rule: str = "retry",
) -> np.ndarray:
    """Cuts the box of `sample_crops` for draws [CROP_TRIES, 4] out of a picture, resized to uint8 [*size, c]."""
    height, width = picture.height, picture.width
    if scale[0] == scale[1] == 1 and ratio[0] == ratio[1] == 1 and (height, width) == tuple(size) and height == width:
        return picture.whole()  # the only possible box
    (box,) = sample_crops(np.asarray([height]), np.asarray([width]), draws[None], scale, ratio, rule)
    return picture.part(tuple(box.tolist()), size, exact=False)


def resize_and_centre_crop(picture: Picture, size: tuple[int, int], eval_crop: float) -> np.ndarray:
    """Resizes a picture, keeping its aspect, and cuts out the centre: uint8 [*size, c].

    The resized picture just covers `size / eval_crop` (224 pixels and 0.875: the shorter side becomes 256). If it is
    more than LONGEST times as long as the aspect asks for, only its middle is resized: 30,000 x 1 pixels would make
    7,680,000 x 256.
    """
    top, left, height, width = _middle(picture.height, picture.width, size)
    least_height, least_width = round(size[0] / eval_crop), round(size[1] / eval_crop)
    # In integers: a float scale can fall one pixel short. The longer side is truncated, as in torchvision.
    if least_height * width >= least_width * height:
        resized = least_height, max(least_width, width * least_height // height)
    else:
        resized = max(least_height, height * least_width // width), least_width
    image = picture.part((top, left, height, width), resized)
    top, left = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]


def _middle(height: int, width: int, size: tuple[int, int]) -> Box:
    """The whole picture, or the middle of one more than LONGEST times as long as `size` asks for."""
    most_height = max(1, LONGEST * width * size[0] // size[1])
    most_width = max(1, LONGEST * height * size[1] // size[0])
    kept_height, kept_width = min(height, most_height), min(width, most_width)
    return (height - kept_height) // 2, (width - kept_width) // 2, kept_height, kept_width


def resize_by_pillow(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [h, w, c] to uint8 [*size, c] by Pillow's antialiasing bicubic filter."""
    if image.shape[:2] == tuple(size):
        return image
    channels = image.shape[2]
    if channels == 3:
        return _resize_plane(image, size)
    # Channel by channel: Pillow has no mode for most numbers of channels, and takes a fourth one for alpha.
    return np.stack([_resize_plane(image[:, :, c], size) for c in range(channels)], axis=2)


def _resize_plane(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))
