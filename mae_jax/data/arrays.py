"""Reads arrays of any type and number of channels from encoded bytes: NumPy files, TIFFs, 16-bit PNGs, DICOM."""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mae_jax.data.files import FORMATS
from mae_jax.runtime.errors import UserError

ARRAYS = ("NPY", "NPZ", "DICOM")  # formats besides Pillow's
NUMPY, ZIP, PNG = b"\x93NUMPY", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n"
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of either byte order; with +: BigTIFF
REDUCED, MASK = 1, 4  # bits of a TIFF page's type (TIFF 6.0, NewSubfileType)
# Colour samples a pixel of photometric interpretations (TIFF 6.0, PhotometricInterpretation).
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
WHITE_IS_ZERO = 0
MAX_VALUE_BYTES = 2**32  # of a picture: a small file may hold more than the memory
ALPHA = (1, 2, 999)  # values of the tag ExtraSamples: 999 is Corel Draw's
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601-2, as in Pillow's greys
ORIENTATION, NO_DATA = 274, 42113  # tags of a TIFF; the second is GDAL's


class BadImage(ValueError):
    """A picture that cannot be used. The message says why; the caller adds the name."""


class Misfit(BadImage):
    """A picture of another shape, type or number of channels than the settings ask for."""


@contextlib.contextmanager
def naming_the_damage() -> Iterator[None]:
    """Turns any error from a picture, but the user's mistakes, into a BadImage."""
    try:
        yield
    except (BadImage, UserError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"absurdly large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not a picture in any of the formats {', '.join((*FORMATS, *ARRAYS))}") from error
    except Exception as error:  # on damaged files, libraries raise almost anything
        raise BadImage(f"damaged: {str(error) or type(error).__name__}") from error


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")


@naming_the_damage()
def read_array(
    data: bytes,
    max_pixels: int,
    *,
    channels: int | None = None,
    bands: Sequence[int] | None = None,
    raw: bool = False,
    no_data: bool = False,
) -> np.ndarray | None:
    """The values [h, w, c] of an encoded picture in their own type, upright, all channels; None: Pillow reads it.

    Pillow reads 8-bit grey and colours, with or without transparency, and formats that are not here. Pages of a TIFF
    and frames of DICOM are channels: `channels`, if given, is how many they must be, and three are no colours, unless
    `bands` are chosen. `raw`: TIFFs of 8-bit colours too. `no_data`: GDAL's no-data value of whole numbers becomes NaN,
    as that of floats always does. Raises BadImage, and UserError if a package is missing.
    """
    pages = 1
    if data.startswith(NUMPY):
        array = channels_last(np.load(io.BytesIO(data), allow_pickle=False))
    elif data.startswith(ZIP):
        array = channels_last(_read_npz(data))
    elif data.startswith(TIFFS):
        array, pages = _read_tiff(data, max_pixels, raw, no_data)
    elif data.startswith(PNG) and data[24:25] == b"\x10":
        array = _read_png(data, max_pixels)
    elif data[128:132] == b"DICM":
        array, pages = _read_dicom(data, max_pixels)
    else:
        return None
    if array is None:
        return None
    if pages > 1 and bands is None and (array.shape[2] == 3 or channels not in (None, array.shape[2])):
        raise Misfit(f"a file of {pages} pages: save each as a file, or choose some as channels by data.bands")
    check_pixels(*array.shape[:2], max_pixels)
    return array


def channels_last(array: np.ndarray) -> np.ndarray:
    """[h, w] or [h, w, c] as [h, w, c]; BadImage for anything else."""
    if array.ndim not in (2, 3):
        raise Misfit(f"an array {array.dtype}{list(array.shape)}, not a picture [h, w] or [h, w, c]")
    if not array.size:
        raise BadImage(f"an array {list(array.shape)} without pixels")
    return array[:, :, None] if array.ndim == 2 else array


def _check_size(size: int) -> None:
    if size > MAX_VALUE_BYTES:
        raise BadImage(f"{size:,} bytes of values, more than {MAX_VALUE_BYTES:,}: cut it into smaller pictures")


def _read_npz(data: bytes) -> np.ndarray:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        if len(arrays.files) != 1 and "image" not in arrays.files:
            raise BadImage(f"an archive of {', '.join(arrays.files) or 'nothing'}: name the picture's array image")
        name = arrays.files[0] if len(arrays.files) == 1 else "image"
        _check_size(sum(member.file_size for member in arrays.zip.infolist()))
        return np.asarray(arrays[name])


def _read_tiff(data: bytes, max_pixels: int, raw: bool, no_data: bool) -> tuple[np.ndarray | None, int]:
    """The values, None if Pillow reads them, and the number of pages."""
    import tifffile  # imported here: it takes a quarter of a second

    with tifffile.TiffFile(io.BytesIO(data), is_ome=False) as file:  # OME names further files
        stacks = [stack for stack in file.series if not stack.keyframe.subfiletype & (REDUCED | MASK)]
        page = stacks[0].keyframe
        pages = sum(math.prod(n for n, axis in zip(s.shape, s.axes, strict=True) if axis not in "YXS") for s in stacks)
        tag = page.tags.get(NO_DATA)
        if pages == 1 and not raw and not (tag and no_data) and _is_plain(page):
            return None, pages
        if len({(stack.shape, stack.axes, stack.dtype) for stack in stacks}) > 1:
            raise BadImage(f"a TIFF of {pages} pages that differ in size or type: save each as a file")
        check_pixels(page.imagelength, page.imagewidth, max_pixels)
        _check_size(sum(stack.nbytes for stack in stacks))
        planes = []
        for stack in stacks:
            found, axes = stack.asarray(maxworkers=1), stack.axes
            found = np.moveaxis(found, (axes.index("Y"), axes.index("X")), (0, 1))
            planes.append(found.reshape(*found.shape[:2], -1))
        array = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        if page.photometric == WHITE_IS_ZERO:
            array = _inverted(array, 0, 2**page.bitspersample - 1)
        if tag and (array.dtype.kind == "f" or no_data):
            array = array.astype(np.result_type(array, np.float32))
            array[array == array.dtype.type(float(str(tag.value).strip("\0 ")))] = np.nan
        return turned(array, page.tags.valueof(ORIENTATION, 1)), pages


def _is_plain(page: Any) -> bool:
    """Whether a TIFF page has at most 8 bits and only colours and transparency, as Pillow reads it."""
    extra = page.samplesperpixel - COLOURS.get(page.photometric, page.samplesperpixel)
    marked = extra <= 0 or extra == len(page.extrasamples) == 1 and page.extrasamples[0] in ALPHA
    return marked and page.dtype in (np.uint8, np.bool_)


def _inverted(array: np.ndarray, low: int, high: int) -> np.ndarray:
    """Values of which `low` is white and `high` black, the other way round."""
    if array.dtype.kind not in "iub":
        raise BadImage(f"{array.dtype} values of which 0 is white, but which is black? Save them with 0 as black")
    return (low + high - array.astype(np.int64)).astype(array.dtype)


def _read_png(data: bytes, max_pixels: int) -> np.ndarray:
    import imagecodecs

    check_pixels(int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big"), max_pixels)
    array, orientation = channels_last(imagecodecs.png_decode(data)), 1
    if b"eXIf" in data:
        picture = Image.open(io.BytesIO(data))
        picture.load()  # the orientation may stand behind the pixels
        orientation = picture.getexif().get(ORIENTATION, 1)
    return turned(array, orientation)


def _read_dicom(data: bytes, max_pixels: int) -> tuple[np.ndarray, int]:
    """The values and the number of frames."""
    try:
        import pydicom
        from pydicom.pixels import apply_rescale, pixel_array
    except ImportError as error:
        raise UserError("a DICOM file, which needs another package: pip install pydicom") from error

    record = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in record and "FloatPixelData" not in record and "DoubleFloatPixelData" not in record:
        raise BadImage(f"a DICOM record without a picture ({record.get('Modality', 'of no modality')})")
    check_pixels(record.Rows, record.Columns, max_pixels)
    colours = record.PhotometricInterpretation
    if colours == "PALETTE COLOR":
        raise BadImage("a DICOM picture with a palette, which is not read: save its colours")
    frames = int(record.get("NumberOfFrames", 1) or 1)
    _check_size(frames * record.Rows * record.Columns * record.SamplesPerPixel * record.BitsAllocated // 8)
    array = pixel_array(record)
    if frames > 1:
        array = np.moveaxis(array, 0, 2).reshape(record.Rows, record.Columns, -1)
    if colours == "MONOCHROME1":
        bits, signed = record.BitsStored, record.PixelRepresentation
        low = -(2 ** (bits - 1)) if signed else 0
        array = _inverted(array, low, low + 2**bits - 1)
    if (record.get("RescaleSlope", 1), record.get("RescaleIntercept", 0)) != (1, 0):
        array = apply_rescale(array, record)
    return channels_last(array), frames


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Stored rows and columns [h, w, c] as they are seen (EXIF 2.3, section 4.6.4, Orientation)."""
    array = array[::-1] if orientation in (3, 4, 6, 7) else array
    array = array[:, ::-1] if orientation in (2, 3, 7, 8) else array
    return array.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else array


def batch_dtype(dtype: np.dtype) -> np.dtype:
    """The type of a batch of such values: all are kept, but of 32-bit integers and larger types float32's 24 bits."""
    kept = {"b1": "uint8", "u1": "uint8", "u2": "uint16", "i1": "int16", "i2": "int16", "f2": "float16"}
    if dtype.kind not in "buif":
        raise Misfit(f"an array of {dtype}, which are no numbers of a picture")
    return np.dtype(kept.get(dtype.str[1:], np.float32))


def fitted(
    array: np.ndarray, channels: int, dtype: np.dtype | str | None = None, bands: Sequence[int] | None = None
) -> np.ndarray:
    """The values [h, w, channels] that a model sees of [h, w, c], in `dtype` (None: `batch_dtype`); see `open_picture`.

    Raises BadImage; Misfit if the array does not suit the settings.
    """
    own = batch_dtype(array.dtype)
    wanted = np.dtype(dtype or own)
    if wanted != np.float32 and not np.can_cast(own, wanted):
        both = batch_dtype(np.promote_types(own, wanted))
        scale = " and data.value_range=(low, high)" if wanted == np.uint8 else ""
        raise Misfit(f"{array.dtype} among {wanted} pictures: set data.dtype={both}{scale}")
    array = _choose_channels(array * np.uint8(255) if array.dtype == bool else array, channels, bands)
    with np.errstate(over="ignore"):
        array = array.astype(wanted, copy=False)
    if wanted.kind == "f" and np.isinf(array).any():
        raise BadImage("infinite values: fix them, or save NaN for no data")
    return array


def _choose_channels(array: np.ndarray, channels: int, bands: Sequence[int] | None) -> np.ndarray:
    found = array.shape[2]
    if bands is not None:
        if max(bands) >= found:
            raise Misfit(f"{found} channels, too few for data.bands={tuple(bands)}, which counts from 0")
        return array[:, :, list(bands)]
    if found == channels:
        return array
    if (found, channels) == (1, 3):
        return np.repeat(array, 3, axis=2)
    if (found, channels) == (3, 1) and array.dtype == np.uint8:
        return np.asarray(Image.fromarray(array).convert("L"))[:, :, None]
    if (found, channels) == (3, 1):
        grey = array @ np.asarray(LUMA)[:, None]
        return (grey if array.dtype.kind == "f" else np.rint(grey)).astype(array.dtype)
    first = "; if its channels are first, make it [h, w, c] by numpy.moveaxis(array, 0, 2)"
    raise Misfit(
        f"an array {list(array.shape)} has {found} channels, but model.channels={channels}: change that, or choose "
        f"channels by data.bands{first if array.shape[0] < min(array.shape[1:]) else ''}"
    )
