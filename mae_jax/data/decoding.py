"""Decodes encoded bytes and arrays to uint8 pictures: colour modes, orientation, transparency, and refusals."""

import contextlib
import io
import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

from mae_jax.data.files import FORMATS
from mae_jax.data.transforms import Box, Picture, Pixels, Range
from mae_jax.data.values import (
    BadImage,
    check_bands,
    check_pages,
    deep_type,
    describe_unknown,
    scaled,
    to_eight_bits,
)
from mae_jax.runtime.errors import UserError

# How much larger than the wanted size a box must stay after the decoder shrinks it. At 1, the decoder's sharper filter
# would do all of the resizing.
SPARE = 1.5

_ORIENTATION_TAG = 0x0112  # EXIF 2.3, section 4.6.4
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8)}


def decode(data: bytes | np.ndarray, channels: int, max_pixels: int, value_range: Range | None = None) -> np.ndarray:
    """The whole picture as uint8 [h, w, channels]; see `open_picture`."""
    return open_picture(data, channels, max_pixels, value_range).whole()


def open_picture(data: bytes | np.ndarray, channels: int, max_pixels: int, value_range: Range | None = None) -> Picture:
    """Opens a picture; its pixels are decoded on demand.

    Encoded bytes become what a viewer shows on white paper: turned by the EXIF orientation, transparency over white,
    the first frame of an animation; 1 channel is the luminance (ITU-R 601). Arrays stay as they are, except that grey
    is repeated to 3 channels and 3 become 1. Values other than unsigned 8-bit need `value_range`.

    Args:
      data: an encoded picture, or uint8 [h, w] or [h, w, c].
      channels: 1 or 3 for encoded pictures, any number for arrays.
      max_pixels: larger encoded pictures are refused before decoding; Pillow's own limit is 178,956,970.
      value_range: (low, high), the values that become 0 and 255, for 8-bit pictures and arrays too; clipped beyond.

    Raises:
      BadImage: empty, truncated, unknown or too large, or unusable values; perhaps only when pixels are read.
      UserError: the channels of the data set cannot become `channels`.
    """
    if isinstance(data, np.ndarray):
        return Pixels(_from_array(data, channels, value_range))
    if channels not in (1, 3):
        raise UserError(f"encoded pictures have 1 or 3 channels, but model.channels={channels}: set it to 3")
    if not data:
        raise BadImage("the file is empty")
    with _naming_the_damage(data):
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > max_pixels:
            raise BadImage(f"{picture.width} x {picture.height} pixels are more than data.max_pixels={max_pixels}")
        check_pages(picture)
        return Encoded(picture, channels, value_range, data)


def to_array(picture: Image.Image, channels: int, value_range: Range | None = None) -> np.ndarray:
    """uint8 [h, w, channels] of a Pillow picture of any mode, upright; see `open_picture`."""
    deep = deep_type(picture)
    if deep and picture.mode == "RGB":
        raise BadImage(f"{deep[0]}, of which Pillow keeps 8 bits: give its path, or an array of its values")
    return Encoded(picture, channels, value_range).whole()


class Encoded:
    """A Pillow picture, upright `height` x `width` pixels. It can be decoded once: call `whole` or `part`, not both."""

    def __init__(self, picture: Image.Image, channels: int, value_range: Range | None, data: bytes = b""):
        self._picture, self._channels, self._value_range = picture, channels, value_range
        check_bands(picture)
        deep = deep_type(picture)  # known only before loading
        if picture.format != "JPEG":  # other formats may store the orientation after the pixels
            picture.load()
        self._transpose = _transpose_of(picture)
        if deep:
            self._picture = Image.fromarray(to_eight_bits(picture, deep, value_range, data))
            self._value_range = None
        self.width, self.height = picture.size[::-1] if self._transpose in _SWAPS_SIDES else picture.size

    def whole(self) -> np.ndarray:
        return _from_array(np.asarray(self._load()), self._channels)

    def part(self, box: Box, size: tuple[int, int], exact: bool = True) -> np.ndarray:
        """The box resized to uint8 [*size, channels]; see `Picture`.

        If not `exact`, the JPEG decoder may first shrink the picture by 2, 4 or 8, as long as the box stays larger than
        `size` by SPARE: several times as fast, and as close to the exact part as another good filter (40 dB and more;
        tests/data/test_parts.py).
        """
        top, left, height, width = box
        scale = 1 if exact else self._scale_for(min(height / size[0], width / size[1]))
        picture = self._load(scale)
        # The decoder rounds sides up, so the box's corners are simply divided. Crop before resizing: pixels outside the
        # box must have no influence, as at full size.
        top, left, bottom, right = top / scale, left / scale, (top + height) / scale, (left + width) / scale
        outer_top, outer_left = math.floor(top), math.floor(left)
        picture = picture.crop((outer_left, outer_top, math.ceil(right), math.ceil(bottom)))
        inner = left - outer_left, top - outer_top, right - outer_left, bottom - outer_top
        return _from_array(np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, inner)), self._channels)

    def _scale_for(self, reduction: float) -> int:
        """The factor by which the decoder may shrink the picture if its box is then reduced by `reduction`."""
        if self._picture.format != "JPEG":
            return 1
        # If sides were rounded up, turning the picture would move its corner.
        sides = (0,) if self._transpose is None else self._picture.size
        fits = (s for s in (8, 4, 2) if reduction >= SPARE * s and all(side % s == 0 for side in sides))
        return next(fits, 1)

    def _load(self, scale: int = 1) -> Image.Image:
        """The upright picture in mode L or RGB, its values scaled."""
        picture = self._picture
        with _naming_the_damage():
            if scale > 1:
                picture.draft(picture.mode, (picture.width // scale, picture.height // scale))
            picture.load()
            if self._transpose is not None:
                picture = picture.transpose(self._transpose)
            picture = _to_grey_or_rgb(picture)
            if self._value_range:
                table = scaled(np.arange(256, dtype=np.uint8), self._value_range).tolist()
                picture = picture.point(table * len(picture.getbands()))
            return picture.convert("L") if self._channels == 1 and picture.mode == "RGB" else picture


@contextlib.contextmanager
def _naming_the_damage(data: bytes = b"") -> Iterator[None]:
    """Turns any error from a picture (`data` is its file) into a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"absurdly large: {error}") from error
    except Image.UnidentifiedImageError as error:
        what = describe_unknown(data) or f"not a picture in any of the formats {', '.join(FORMATS)}"
        raise BadImage(what) from error
    except Exception as error:  # on damaged files, Pillow raises almost anything
        raise BadImage(f"damaged: {str(error) or type(error).__name__}") from error


def _from_array(image: np.ndarray, channels: int, value_range: Range | None = None) -> np.ndarray:
    """uint8 [h, w] or [h, w, c] -> uint8 [h, w, channels]."""
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.dtype != np.uint8:
        raise UserError(f"the data give an array {image.dtype}{list(image.shape)}, not a picture uint8 [h, w, c]")
    if not image.size:
        raise BadImage(f"an array {list(image.shape)} without pixels")
    if value_range:
        image = scaled(image, value_range)
    if image.shape[2] == channels:
        return image
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 3 and channels == 1:
        return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    if image.shape[0] in (1, 3, channels) or image.shape[0] < min(image.shape[1:]):
        raise UserError(
            f"an array {list(image.shape)} has its channels first, or {image.shape[2]} of them: pictures are "
            "[h, w, c], as numpy.moveaxis(array, 0, 2) makes them"
        )
    raise UserError(
        f"the pictures have {image.shape[2]} channels, but model.channels={channels}: "
        f"set model.channels to {image.shape[2]}"
    )


def _transpose_of(picture: Image.Image) -> Image.Transpose | None:
    try:
        return _TRANSPOSE.get(picture.getexif().get(_ORIENTATION_TAG))
    except Exception:  # a damaged EXIF block does not spoil the picture
        return None


def _to_grey_or_rgb(picture: Image.Image) -> Image.Image:
    """Converts a picture of any 8-bit mode to mode L (grey) or RGB."""
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    wanted = "L" if picture.mode in ("1", "L") else "RGB"
    return picture if picture.mode == wanted else picture.convert(wanted)  # convert() always copies
