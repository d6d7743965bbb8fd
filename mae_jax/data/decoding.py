"""Decodes files and arrays to uint8 pictures: orientation, colours, transparency, deep values, refusals."""

import contextlib
import io
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from mae_jax.data.fast_jpeg import cut_jpeg, open_plain
from mae_jax.data.files import FORMATS
from mae_jax.data.transforms import LARGEST_SIDE, Box, Picture, Range, Size
from mae_jax.runtime.errors import UserError

# How much larger than the wanted size a box must stay after the decoder shrinks it. At 1, the decoder's sharper filter
# would do all of the resizing.
SPARE = 1.5

_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
_TRANSPOSE = {number: Image.Transpose[name] for number, name in enumerate(_TURNS, 2)}  # EXIF 2.3, section 4.6.4

# Pillow's raw modes that keep all bits -> name for messages, NumPy type.
_DEEP = {
    "I;12": ("12-bit grey", np.uint16),
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N", "I;16R"), ("16-bit grey", np.uint16)),
    **dict.fromkeys(("I;16S", "I;16BS"), ("signed 16-bit grey", np.int32)),
    "I;32N": ("32-bit grey", np.uint32),
    **dict.fromkeys(("I", "I;32S", "I;32BS"), ("signed 32-bit grey", np.int32)),
    **dict.fromkeys(("F", "F;32F", "F;32BF"), ("32-bit float grey", np.float32)),
    **dict.fromkeys(("RGB;16L", "RGB;16B", "RGB;16N"), ("16-bit RGB", np.uint16)),
}
_SWAPPED = ("I;16BS", "I;32BS", "F;32BF")  # Pillow 13 swaps their bytes again after libtiff did
_NOT_READ = "which is not read: save it as 8- or 16-bit grey or RGB, as PNG or uncompressed TIFF"
# Tags of TIFF 6.0 and their values.
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 254, 258, 262, 277, 284, 338, 339
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # photometric interpretation -> colour samples per pixel
_KINDS = {2: "signed ", 3: "float ", 5: "complex ", 6: "complex "}


class BadImage(ValueError):
    """A picture that cannot be used. The message says why; the caller adds the name."""


def open_picture(data: bytes | np.ndarray, channels: int, max_pixels: int, value_range: Range | None = None) -> Picture:
    """Opens a picture; its pixels are decoded on demand.

    Encoded bytes, for 1 or 3 channels, become what a viewer shows on white paper: turned by the EXIF orientation,
    transparency over white, the first frame of an animation; 1 channel is the luminance (ITU-R 601). Arrays, uint8 [h,
    w] or [h, w, c], only change between 1 and 3 channels. `value_range` (low, high) are the values that become 0 and
    255; others than 8-bit need it. Raises BadImage, perhaps only when pixels are read, and UserError for channels.
    """
    if isinstance(data, np.ndarray):
        return Picture(_from_array(data, channels, value_range))
    if channels not in (1, 3):
        raise UserError(f"encoded pictures have 1 or 3 channels, but model.channels={channels}: set it to 3")
    if not data:
        raise BadImage("the file is empty")

    def open_fully() -> Encoded:
        with _naming_the_damage():
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > max_pixels:
                raise BadImage(f"{picture.width} x {picture.height} pixels are more than data.max_pixels={max_pixels}")
            _check_pages(picture)
            return Encoded(picture, channels, value_range, data)

    plain = channels == 3 and value_range is None and open_plain(data, max_pixels, 2 * SPARE, open_fully)
    return plain or open_fully()


class Encoded(Picture):
    """A Pillow picture, upright `height` x `width` pixels. It can be decoded once: call `whole` or `part`, not both."""

    def __init__(self, picture: Image.Image, channels: int, value_range: Range | None, data: bytes = b""):
        self._picture, self._channels, self._value_range, self._data = picture, channels, value_range, data
        _check_bands(picture)
        deep = deep_type(picture)  # known only before loading
        if picture.format != "JPEG":  # other formats may store the orientation after the pixels
            picture.load()
        self._orientation = 1
        with contextlib.suppress(Exception):  # a damaged EXIF block does not spoil the picture
            self._orientation = picture.getexif().get(0x0112, 1)
        if deep:
            self._picture = Image.fromarray(_to_eight_bits(picture, *deep, value_range, data))
            self._value_range = None
        self.width, self.height = picture.size if self._orientation not in (5, 6, 7, 8) else picture.size[::-1]

    def whole(self) -> np.ndarray:
        return _from_array(np.asarray(self._load()), self._channels)

    def part(self, box: Box, size: Size, exact: bool = True) -> np.ndarray:
        """The box resized to uint8 [*size, channels]; see `Picture`.

        If not `exact`, the JPEG decoder may first shrink the picture by 2, 4 or 8, as long as the box stays larger than
        `size` by SPARE: several times as fast, and as close to the exact part as another good filter (40 dB and more).
        Else a JPEG may be read by `cut_jpeg` (62 dB).
        """
        top, left, height, width = box
        scale = 1 if exact else self._scale_for(min(height / size[0], width / size[1]))
        if scale == 1 and not exact and self._is_plain() and (part := cut_jpeg(self._data, box, size)) is not None:
            return part
        picture = self._load(scale)
        # The decoder rounds sides up, so the box's corners are simply divided. Crop before resizing: pixels outside the
        # box must have no influence, as at full size.
        top, left, bottom, right = top / scale, left / scale, (top + height) / scale, (left + width) / scale
        outer_top, outer_left = math.floor(top), math.floor(left)
        picture = picture.crop((outer_left, outer_top, math.ceil(right), math.ceil(bottom)))
        inner = left - outer_left, top - outer_top, right - outer_left, bottom - outer_top
        return _from_array(np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, inner)), self._channels)

    def _is_plain(self) -> bool:
        """Whether this is an upright grey or RGB JPEG for 3 channels, too large to live on a device."""
        plain = self._picture.format == "JPEG" and self._picture.mode in ("L", "RGB")
        plain &= self._orientation not in _TRANSPOSE and self._channels == 3 and not self._value_range
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
        """The upright picture in mode L or RGB, its values scaled."""
        picture = self._picture
        with _naming_the_damage():
            if scale > 1:
                picture.draft(picture.mode, (picture.width // scale, picture.height // scale))
            picture.load()
            if self._orientation in _TRANSPOSE:
                picture = picture.transpose(_TRANSPOSE[self._orientation])
            picture = _to_grey_or_rgb(picture)
            if self._value_range:
                table = scaled(np.arange(256, dtype=np.uint8), self._value_range).tolist()
                picture = picture.point(table * len(picture.getbands()))
            return picture.convert("L") if self._channels == 1 and picture.mode == "RGB" else picture


@contextlib.contextmanager
def _naming_the_damage() -> Iterator[None]:
    """Turns any error from a picture into a BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"absurdly large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not a picture in any of the formats {', '.join(FORMATS)}, or of a kind {_NOT_READ}") from error
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
    raise UserError(
        f"an array {list(image.shape)} has {image.shape[2]} channels, but model.channels={channels}: change that or, "
        "if its channels are first, make it [h, w, c] by numpy.moveaxis(array, 0, 2)"
    )


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


def scaled(values: np.ndarray, value_range: Range) -> np.ndarray:
    """Values as uint8: `low` and below become 0, `high` and above 255; linear in between, rounded."""
    low, high = value_range

    def scale(some: np.ndarray) -> np.ndarray:
        return np.rint(np.clip((some.astype(np.float64) - low) * 255 / (high - low), 0, 255)).astype(np.uint8)

    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return scale(np.arange(2 ** (8 * values.dtype.itemsize)))[values]
    parts = np.array_split(values, -(-values.size // 2**22) or 1)  # all at once would take several times the memory
    return np.concatenate([scale(part) for part in parts])


def _check_bands(picture: Image.Image) -> None:
    """Raises BadImage for a TIFF with samples beyond its colours and transparency."""
    tags = getattr(picture, "tag_v2", {})
    samples, extra = tags.get(_SAMPLES, 1), tuple(tags.get(_EXTRA, ()))
    beyond = samples - _COLOURS.get(tags.get(_PHOTOMETRIC, 0), samples)
    if beyond > 0 and not (beyond == len(extra) == 1 and extra[0] in (1, 2, 999)):  # alpha; 999 is Corel Draw's
        raise BadImage(f"{_describe(tags)}, {beyond} beyond its colours, not marked as transparency: save only colours")


def _check_pages(picture: Image.Image) -> None:
    """Raises BadImage for a TIFF with further pages, other than smaller copies and masks."""
    if picture.format == "TIFF":
        for page in range(1, picture.n_frames):
            picture.seek(page)
            if not picture.tag_v2.get(_SUBFILE, 0) & (1 | 4):  # a reduced copy, or a mask
                raise BadImage(f"a TIFF of {picture.n_frames} pages: save each as a file")
        picture.seek(0)


def deep_type(picture: Image.Image) -> tuple[str, type] | None:
    """Name and NumPy type of the values of an unloaded picture, None: unsigned 8-bit. BadImage if they are not kept."""
    tags, tile = getattr(picture, "tag_v2", {}), next(iter(getattr(picture, "tile", ())), None)
    codec, args = (tile.codec_name, tile.args) if tile else ("", picture.mode)
    args = args if isinstance(args, tuple) else (args,)
    raw = str(args[0] if args else "")
    bits = max(tags.get(_BITS, (1,))) if tags else 16 if picture.format == "PNG" and ";16" in raw else 8
    if codec.startswith("ppm") and len(args) > 1:  # scaled by the header's white value
        bits = args[-1].bit_length()
    garbled = codec == "libtiff" and raw in _SWAPPED
    garbled |= bits > 8 and tags.get(_PLANAR) == 2 and tags.get(_SAMPLES, 1) > 1
    if raw in _DEEP and not garbled:
        return _DEEP[raw]
    if bits > 8 or garbled or picture.mode in _DEEP:
        what = _describe(tags) if tags else f"a {picture.format} of {bits}-bit {raw.split(';')[0]}"
        raise BadImage(f"{what}, {_NOT_READ}")
    return ("signed 8-bit grey", np.int8) if tags.get(_SAMPLE_FORMAT, (1,))[0] == 2 else None


def _to_eight_bits(picture: Image.Image, name: str, dtype: type, value_range: Range | None, data: bytes) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3] of a `deep_type`; of 16-bit colours, the low bytes are read from `data`."""
    values = np.asarray(picture)
    if picture.mode == "RGB":
        if not data:
            raise BadImage(f"{name}, of which Pillow keeps 8 bits: give its path, or an array of its values")
        values = values.astype(dtype) << 8 | _low_bytes(data)
    elif dtype in (np.int8, np.uint32):  # Pillow takes these for uint8 and int32
        values = values.view(dtype)
    if not np.isfinite(values).all():
        raise BadImage(f"{name} with values that are not finite")
    if value_range is None:
        raise BadImage(
            f"{name} with values from {values.min():g} to {values.max():g}; nothing says which are black and white: "
            "set data.value_range=(low, high), which scales every picture alike"
        )
    if "transparency" in picture.info:
        raise BadImage(f"{name} with a transparent value, which is not supported: save the picture without it")
    grey = scaled(values, value_range)
    return 255 - grey if getattr(picture, "tag_v2", {}).get(_PHOTOMETRIC) == 0 else grey


def _low_bytes(data: bytes) -> np.ndarray:
    """Of 16-bit colours Pillow keeps the high byte; with the byte order reversed, it keeps the low one."""
    picture, reversed_order = Image.open(io.BytesIO(data)), {"L": "B", "B": "L", "N": "LB"[sys.byteorder == "little"]}
    for place, tile in enumerate(picture.tile):
        raw, *others = [tile.args] if isinstance(tile.args, str) else tile.args
        args = (raw[:-1] + reversed_order[raw[-1]], *others)
        picture.tile[place] = tile._replace(args=args if others else args[0])
    return np.asarray(picture)


def _describe(tags: Mapping[int, Any]) -> str:
    bits, kind = max(tags.get(_BITS, (1,))), _KINDS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "")
    return f"a TIFF of {tags.get(_SAMPLES, 1)} x {bits}-bit {kind}numbers a pixel"
