"""Geometry on the host: the random crop of training and the centre crop of evaluation, on uint8 pictures."""

import math

import numpy as np
from PIL import Image

CROP_TRIES = 10  # draws before the central crop is taken, as in torchvision's RandomResizedCrop


def sample_crop(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    Args:
      height, width: of the picture, pixels.
      rng: consumed by the draw.
      scale: least and greatest area of the box as a share of the picture's, drawn uniformly.
      ratio: least and greatest width / height of the box, drawn uniformly on a log scale.

    Returns:
      (top, left, height, width) of a box inside the picture. If no draw fits, the largest central box whose
      ratio lies within the limits.
    """
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width = min(width, max(1, round(height * aspect)))
    box_height = min(height, max(1, round(width / aspect)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def sample_clipped_crop(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws a box as `sample_crop` does, but once: sides that are longer than the picture's are cut to them.

    The rule that the authors of MAE train their linear probe with. An area may be below `scale`, and a ratio beyond
    `ratio`.
    """
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    box_width = min(max(1, round(math.sqrt(area * aspect))), width)
    box_height = min(max(1, round(math.sqrt(area / aspect))), height)
    top = int(rng.integers(height - box_height + 1))
    left = int(rng.integers(width - box_width + 1))
    return top, left, box_height, box_width


CROP_RULES = {"retry": sample_crop, "clip": sample_clipped_crop}  # data.crop_rule -> how the box is drawn


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rule: str = "retry",
) -> np.ndarray:
    """Cuts a random box out of `image` (uint8 [h, w, c]) and resizes it to uint8 [*size, c]; see CROP_RULES."""
    height, width, _ = image.shape
    if scale[0] == scale[1] == 1 and ratio[0] == ratio[1] == 1 and (height, width) == tuple(size) and height == width:
        return image  # the only possible box is the whole picture: no need to draw it
    top, left, box_height, box_width = CROP_RULES[rule](height, width, rng, scale, ratio)
    return resize(image[top : top + box_height, left : left + box_width], size)


def resize_and_centre_crop(image: np.ndarray, size: tuple[int, int], eval_crop: float) -> np.ndarray:
    """Resizes `image` (uint8 [h, w, c]) and cuts out its centre, uint8 [*size, c].

    The picture is resized, keeping its aspect, to the smallest size that covers `size / eval_crop` (for
    224 pixels and 0.875: the shorter side becomes 256). With `eval_crop` 1 and a picture that already has the
    right size, nothing is done to it.
    """
    height, width, _ = image.shape
    least_height, least_width = round(size[0] / eval_crop), round(size[1] / eval_crop)
    # In integers, because a float scale can fall one pixel short. The longer side is truncated, as in torchvision.
    if least_height * width >= least_width * height:
        resized = least_height, max(least_width, width * least_height // height)
    else:
        resized = max(least_height, height * least_width // width), least_width
    image = resize(image, resized)
    top, left = (resized[0] - size[0]) // 2, (resized[1] - size[1]) // 2
    return image[top : top + size[0], left : left + size[1]]


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes uint8 [h, w, c] to uint8 [*size, c] by Pillow's bicubic filter, which antialiases."""
    if image.shape[:2] == tuple(size):
        return image
    channels = image.shape[2]
    if channels == 3:
        return _resize_plane(image, size)
    # Channel by channel: Pillow has no mode for most counts, and would weigh four channels by the last, as alpha.
    return np.stack([_resize_plane(image[:, :, c], size) for c in range(channels)], axis=2)


def _resize_plane(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))
