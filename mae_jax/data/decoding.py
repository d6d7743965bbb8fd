"""Decodes files and arrays to pictures: orientation, colours, transparency, deep values, refusals."""

import contextlib
import functools
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageCms

from mae_jax.data.arrays import BadImage, Misfit, channels_last, check_pixels, fitted, naming_the_damage, read_array
from mae_jax.data.fast_jpeg import cut_jpeg, open_plain
from mae_jax.data.files import FORMATS
from mae_jax.data.transforms import LARGEST_SIDE, Box, Picture, Size
from mae_jax.runtime.errors import UserError

# How much larger than the wanted size a box must stay after the decoder shrinks it. At 1, the decoder's sharper filter
# would do all of the resizing.
SPARE = 1.5

_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
_TRANSPOSE = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, 2)}  # EXIF 2.3, section 4.6.4


def open_picture(
    data: bytes | np.ndarray | Image.Image,
    channels: int,
    max_pixels: int,
    dtype: np.dtype | str | None = None,
    bands: Sequence[int] | None = None,
) -> Picture:
    """Opens a picture of `channels` and `dtype` (None: its own `batch_dtype`); its pixels may be decoded on demand.

    Encoded 8-bit pictures, for 1 or 3 channels, become what a viewer shows on white paper: turned by the EXIF
    orientation, transparency over white, the first frame of an animation; 1 channel is the luminance (ITU-R 601).
    Others, and arrays [h, w] or [h, w, c], keep their values and channels, of which `bands` are chosen; without them
    only 1 and 3 channels change into one another. Raises BadImage, perhaps only when pixels are read; for arrays that
    do not suit the settings UserError.
    """
    if isinstance(data, np.ndarray):
        try:
            return Picture(fitted(channels_last(data), channels, dtype, bands))
        except Misfit as error:
            raise UserError(str(error)) from error
    arguments = data, channels, max_pixels, dtype, bands
    if channels == 3 and bands is None and isinstance(data, bytes):
        fully = functools.partial(_open_fully, *arguments)
        if plain := open_plain(data, max_pixels, dtype, 2 * SPARE, fully):
            return plain
    return _open_fully(*arguments)


def _open_fully(
    data: bytes | Image.Image, channels: int, max_pixels: int, dtype: np.dtype | str | None, bands: Sequence[int] | None
) -> Picture:
    raw, picture = bands is not None or channels not in (1, 3), data
    if isinstance(data, bytes):
        if not data:
            raise BadImage("the file is empty")
        no_data = dtype is not None and np.dtype(dtype) == np.float32
        array = read_array(data, max_pixels, channels=channels, bands=bands, raw=raw, no_data=no_data)
        if array is not None:
            return Picture(fitted(array, channels, dtype, bands))
        with naming_the_damage():
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            check_pixels(picture.height, picture.width, max_pixels)
    with naming_the_damage():
        _check_depth(picture)
        opened = Encoded(picture, channels, dtype, data if isinstance(data, bytes) else b"")
        if raw or picture.mode.startswith(("I", "F")):
            return Picture(fitted(channels_last(opened.stored()), channels, dtype, bands))
        return opened


class Encoded(Picture):
    """A Pillow picture, upright `height` x `width` pixels. It can be decoded once, by one of its methods."""

    def __init__(self, picture: Image.Image, channels: int, dtype: np.dtype | str | None = None, data: bytes = b""):
        self._picture, self._channels, self._data = picture, channels, data
        self.dtype = np.dtype(dtype or np.uint8)
        if picture.format != "JPEG":  # other formats may store the orientation after the pixels
            picture.load()
        self._orientation = 1
        with contextlib.suppress(Exception):  # a damaged EXIF block does not spoil the picture
            self._orientation = picture.getexif().get(0x0112, 1)
        self.width, self.height = picture.size if self._orientation not in (5, 6, 7, 8) else picture.size[::-1]

    def whole(self) -> np.ndarray:
        return self._fitted(self._load())

    def stored(self) -> np.ndarray:
        """The upright picture's own channels [h, w] or [h, w, c], transparency too; of palettes the colours."""
        with naming_the_damage():
            picture = self._upright()
            if picture.mode in ("P", "PA"):
                picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            return np.asarray(picture)

    def part(self, box: Box, size: Size, exact: bool = True) -> np.ndarray:
        """The box resized to [*size, channels]; see `Picture`.

        If not `exact`, the JPEG decoder may first shrink the picture by 2, 4 or 8, as long as the box stays larger than
        `size` by SPARE: several times as fast, and as close to the exact part as another good filter (40 dB and more).
        Else a JPEG may be read by `cut_jpeg` (62 dB).
        """
        top, left, height, width = box
        scale = 1 if exact else self._scale_for(min(height / size[0], width / size[1]))
        if scale == 1 and not exact and self._is_plain() and (part := cut_jpeg(self._data, box, size)) is not None:
            return part.astype(self.dtype, copy=False)
        picture = self._load(scale)
        # The decoder rounds sides up, so the box's corners are simply divided. Crop before resizing: pixels outside the
        # box must have no influence, as at full size.
        top, left, bottom, right = top / scale, left / scale, (top + height) / scale, (left + width) / scale
        outer_top, outer_left = math.floor(top), math.floor(left)
        picture = picture.crop((outer_left, outer_top, math.ceil(right), math.ceil(bottom)))
        inner = left - outer_left, top - outer_top, right - outer_left, bottom - outer_top
        return self._fitted(picture.resize(size[::-1], Image.Resampling.BICUBIC, inner))

    def _fitted(self, picture: Image.Image) -> np.ndarray:
        return fitted(channels_last(np.asarray(picture)), self._channels, self.dtype)

    def _is_plain(self) -> bool:
        """Whether this is an upright grey or RGB JPEG for 3 channels, too large to live on a device."""
        plain = self._picture.format == "JPEG" and self._picture.mode in ("L", "RGB")
        plain &= self._orientation not in _TRANSPOSE and self._channels == 3
        return plain and bool(self._data) and max(self._picture.size) > LARGEST_SIDE

    def _scale_for(self, reduction: float) -> int:
        """The factor by which the decoder may shrink the picture if its box is then reduced by `reduction`."""
        if self._picture.format != "JPEG":
            return 1
        # If sides were rounded up, turning the picture would move its corner.
        sides = self._picture.size if self._orientation in _TRANSPOSE else (0,)
        fits = (s for s in (8, 4, 2) if reduction >= SPARE * s and all(side % s == 0 for side in sides))
        return next(fits, 1)

    def _load(self, scale: int = 1) -> Image.Image:
        """The upright picture in mode L or RGB."""
        with naming_the_damage():
            picture = _to_grey_or_rgb(self._upright(scale))
            return picture.convert("L") if self._channels == 1 and picture.mode == "RGB" else picture

    def _upright(self, scale: int = 1) -> Image.Image:
        picture = self._picture
        if scale > 1:
            picture.draft(picture.mode, (picture.width // scale, picture.height // scale))
        picture.load()
        return picture.transpose(_TRANSPOSE[self._orientation]) if self._orientation in _TRANSPOSE else picture


def _check_depth(picture: Image.Image) -> None:
    """Raises BadImage for an unloaded picture of which Pillow keeps fewer bits than it has."""
    tile = next(iter(getattr(picture, "tile", ())), None)
    args = tile.args if tile and isinstance(tile.args, tuple) else (tile and tile.args,)
    if tile and tile.codec_name.startswith("ppm") and len(args) > 1 and args[-1] > 255:  # the header's white value
        raise BadImage(f"a {picture.format} of {args[-1].bit_length()}-bit numbers: save it as PNG, TIFF or .npy")
    if str(args[0]).startswith(("LA;16", "RGB;16", "RGBA;16")):
        raise BadImage(f"16-bit {picture.mode}, of which Pillow keeps 8 bits: give its path, or an array of its values")


def _to_grey_or_rgb(picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    if picture.mode in ("L", "RGB"):
        return picture  # convert() always copies
    return picture.convert("L" if picture.mode == "1" else "RGB")
