"""Cuts parts out of JPEGs in less time than Pillow."""

import struct
from collections.abc import Callable

import numpy as np

from mae_jax.data.transforms import LARGEST_SIDE, Box, Picture, Size

try:
    import simplejpeg
    from kornia_rs import imgproc
except ImportError:  # not every platform has their wheels
    simplejpeg = imgproc = None


_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive
_TABLES = (0xC4, 0xDB, 0xFE, 0xE0, 0xEE, 0xDD)  # Huffman, quantisation, comments, JFIF, Adobe, restart interval
_SCAN = 0xDA


def plain_jpeg_size(data: bytes) -> Size | None:
    """Height and width of a JPEG that needs no turning: 8-bit grey or three colours, without EXIF or further pictures.

    None for all other JPEGs, other formats and damaged headers.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place, found = 2, None
    try:
        while (kind := data[place + 1]) != _SCAN:
            start, _, length = struct.unpack_from(">BBH", data, place)
            if start != 0xFF or kind not in _FRAMES + _TABLES:  # EXIF, profiles, several pictures
                return None
            if kind in _FRAMES:
                bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
                found = (height, width) if bits == 8 and components in (1, 3) and height and width else None
            place += 2 + length
    except (struct.error, IndexError):
        return None
    return found


class PlainJpeg(Picture):
    """A grey or RGB JPEG that needs no turning, for 3 channels; Pillow opens it only for what `cut_jpeg` cannot do."""

    def __init__(self, data: bytes, size: Size, dtype: np.dtype, largest: float, open_fully: Callable[[], Picture]):
        """`largest`: the reduction from which the decoder is asked to shrink the picture itself."""
        self.dtype = dtype
        self._data, self._largest, self._open_fully = data, largest, open_fully
        self.height, self.width = size

    def whole(self) -> np.ndarray:
        return self._open_fully().whole()

    def part(self, box: Box, size: Size, exact: bool = True) -> np.ndarray:
        if not exact and min(box[2] / size[0], box[3] / size[1]) < self._largest:
            if (part := cut_jpeg(self._data, box, size)) is not None:
                return part.astype(self.dtype, copy=False)
        return self._open_fully().part(box, size, exact)


def open_plain(
    data: bytes, max_pixels: int, dtype: np.dtype | str | None, largest: float, open_fully: Callable[[], Picture]
) -> PlainJpeg | None:
    """None if the picture is no such JPEG, or so small that it may live on a device, where Pillow's crops are made."""
    if imgproc is None or (size := plain_jpeg_size(data)) is None:
        return None
    if size[0] * size[1] > max_pixels or max(size) <= LARGEST_SIDE:
        return None
    return PlainJpeg(data, size, np.dtype(dtype or np.uint8), largest, open_fully)


def cut_jpeg(data: bytes, box: Box, size: Size) -> np.ndarray | None:
    """The box of a grey or RGB JPEG, resized to uint8 [*size, 3]; None if it is not in order, or packages are missing.

    The pixels before resizing are Pillow's: both decoders are libjpeg-turbo. The filter is Pillow's bicubic, too, but
    does not round and clip between rows and columns, and repeats the box's edge where Pillow leaves out what lies
    beyond. Crops of 224 pixels are 62 dB from Pillow's; 95 % of their values are the same.
    """
    if imgproc is None:
        return None
    try:
        image = simplejpeg.decode_jpeg(data)  # refuses whatever libjpeg warns of
    except Exception:  # for Pillow to tell what is wrong, or to read it all the same
        return None
    top, left, height, width = box
    image = np.ascontiguousarray(image[top : top + height, left : left + width])
    # Enlarging takes the same kernel either way, but without antialiasing less time.
    shrinks = height > size[0] or width > size[1]
    return imgproc.resize(image, tuple(size), "bicubic", antialias=shrinks)
