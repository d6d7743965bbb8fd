"""Geometry of pictures on the host: the random crops of training and the centre crops of evaluation."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

Size = tuple[int, int]  # height, width in pixels
Box = tuple[int, int, int, int]  # top, left, height, width in pixels
Range = tuple[float, float]  # low, high

CROP_TRIES = 10  # boxes drawn before falling back on the central one, as in torchvision's RandomResizedCrop
LONGEST = 8  # times the length that the aspect asks for; of longer pictures only the middle is resized
LARGEST_SIDE = 128  # pixels, of pictures that may live on the devices; a table there has its cube in entries, 8 MiB
DRAWS_AT_ONCE = 64  # places whose crops are drawn together (20 KB), since making a generator is slow


class Picture:
    """What crops are taken from: here an array [h, w, c] of any `dtype`; `decoding.Encoded` is decoded on demand."""

    def __init__(self, image: np.ndarray):
        self._image, self.dtype = image, image.dtype
        self.height, self.width, _ = image.shape

    def whole(self) -> np.ndarray:
        """[h, w, c]."""
        return self._image

    def part(self, box: Box, size: Size, exact: bool = True) -> np.ndarray:
        """The box, resized to [*size, c] by Pillow's antialiasing bicubic filter; if not `exact`, nearly so."""
        top, left, height, width = box
        return resize_by_pillow(self._image[top : top + height, left : left + width], size)


# (picture, place in the global order, (height, width)) -> [height, width, c]
Transform = Callable[[Picture, int, Size], np.ndarray]
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # a random change of uint8 [h, w, c]


def augmented(
    picture: Picture, place: int, size: Size, *, transform: Transform, augment: Augment, seed: int
) -> np.ndarray:
    """A transform and then `augment`, whose generator the place seeds."""
    # The 1 keeps this stream apart from that of `crop_draws`, whose counters are below 2^128.
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, place]))
    return augment(transform(picture, place, size), rng)


def crop_draws(seed: int, first: int, count: int) -> np.ndarray:
    """Uniform numbers on [0, 1) for the crops of `count` places from `first` on: float64 [count, CROP_TRIES, 4].

    The four, as many as Philox makes from one counter value, are for a try's area, aspect, top and left. They are
    counter-based (Salmon et al. 2011): `crop_draws(s, p, n)[i] == crop_draws(s, p + i, 1)[0]`.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=int(first) * CROP_TRIES))
    return generator.random((count, CROP_TRIES, 4))


@functools.lru_cache(maxsize=64)  # more than the reading threads
def _draws_of_run(seed: int, run: int) -> np.ndarray:
    return crop_draws(seed, run * DRAWS_AT_ONCE, DRAWS_AT_ONCE)


def sample_crops(
    heights: np.ndarray, widths: np.ndarray, draws: np.ndarray, scale: Range, ratio: Range, rule: str = "retry"
) -> np.ndarray:
    """Boxes int64 [n, 4] of `sample_crop` for pictures of these sides, int [n]; draws [n, CROP_TRIES, 4]."""
    sides = zip(heights.tolist(), widths.tolist(), draws.tolist(), strict=True)
    return np.array([sample_crop(*each, scale, ratio, rule) for each in sides], np.int64).reshape(-1, 4)


def sample_crop(
    height: int, width: int, draws: Sequence[Sequence[float]], scale: Range, ratio: Range, rule: str = "retry"
) -> Box:
    """The box of a random resized crop, inside a picture of these sides.

    The share of a picture's area is uniform in `scale` (Szegedy et al. 2015, arXiv 1409.4842, section 6), width /
    height log-uniform in `ratio`; for `draws` see `crop_draws`. The rule "retry" takes the first try that fits, else
    the largest central box with an allowed ratio; "clip" takes the first try, its sides clipped to the picture's, as in
    the linear probe of MAE's authors.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for share, shape, down, right in draws:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
        aspect = float(np.exp(low + (high - low) * shape))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if rule == "clip":
            box_height, box_width = min(max(box_height, 1), height), min(max(box_width, 1), width)
        if 0 < box_height <= height and 0 < box_width <= width:
            return int(down * (height - box_height + 1)), int(right * (width - box_width + 1)), box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_height = min(height, max(1, round(width / aspect)))
    box_width = min(width, max(1, round(height * aspect)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_crop(
    picture: Picture, place: int, size: Size, *, seed: int, scale: Range, ratio: Range, rule: str = "retry"
) -> np.ndarray:
    """The transform of training: the box of `sample_crop`, which depends only on seed and place, resized."""
    height, width = picture.height, picture.width
    if scale[0] == scale[1] == 1 and ratio[0] == ratio[1] == 1 and (height, width) == tuple(size) and height == width:
        return picture.whole()  # the only possible box
    run, place_in_run = divmod(place, DRAWS_AT_ONCE)
    draws = _draws_of_run(seed, run)[place_in_run].tolist()
    return picture.part(sample_crop(height, width, draws, scale, ratio, rule), size, exact=False)


def centre_crop(picture: Picture, place: int | None, size: Size, *, eval_crop: float) -> np.ndarray:
    """The transform of evaluation: resizes a picture, keeping its aspect, and cuts out the centre.

    The resized picture just covers `size / eval_crop` (224 pixels and 0.875: the shorter side becomes 256). If it is
    more than LONGEST times as long as the aspect asks for, only its middle is resized.
    """
    height = min(picture.height, max(1, LONGEST * picture.width * size[0] // size[1]))
    width = min(picture.width, max(1, LONGEST * picture.height * size[1] // size[0]))
    least_height, least_width = round(size[0] / eval_crop), round(size[1] / eval_crop)
    # In integers: a float scale can fall one pixel short. The longer side is truncated, as in torchvision.
    if least_height * width >= least_width * height:
        resized = least_height, max(least_width, width * least_height // height)
    else:
        resized = max(least_height, height * least_width // width), least_width
    image = picture.part(((picture.height - height) // 2, (picture.width - width) // 2, height, width), resized)
    top, left = round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2)
    return image[top : top + size[0], left : left + size[1]]


def resize_by_pillow(image: np.ndarray, size: Size) -> np.ndarray:
    """Resizes [h, w, c] to [*size, c] by Pillow's antialiasing bicubic filter; other than uint8 in 32-bit floats.

    Integers are rounded and clipped. NaN is no data: a result is the filter's mean of the valid values (a normalised
    convolution), and NaN where these have less than half of its weight.
    """
    if image.shape[:2] == tuple(size):
        return image
    if image.dtype != np.uint8:
        return np.stack([_resize_deep(plane, size) for plane in np.moveaxis(image, 2, 0)], axis=2)
    # Channel by channel: Pillow has no mode for most numbers of channels, and takes a fourth one for alpha.
    planes = [image] if image.shape[2] == 3 else np.moveaxis(image, 2, 0)
    resized = [_filter(plane, size) for plane in planes]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=2)


def _filter(plane: np.ndarray, size: Size) -> np.ndarray:
    """uint8 or float32 [h, w], or uint8 [h, w, 3], resized."""
    picture = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(picture.resize(tuple(size)[::-1], Image.Resampling.BICUBIC))


def _resize_deep(plane: np.ndarray, size: Size) -> np.ndarray:
    values, floats = plane.astype(np.float32), plane.dtype.kind == "f"
    empty = np.isnan(values)
    resized = _filter(np.where(empty, np.float32(0), values), size)
    if empty.any():
        weights = _filter(np.float32(~empty), size)
        resized = np.where(weights < 0.5, np.nan, resized / np.maximum(weights, 0.5))
    limits = np.finfo(plane.dtype) if floats else np.iinfo(plane.dtype)
    return np.clip(resized if floats else np.rint(resized), limits.min, limits.max).astype(plane.dtype)
