"""Pixel values other than 8-bit grey and RGB: their type, and their scaling by `data.value_range`."""

import io
import sys

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mae_jax.data.transforms import Range


class BadImage(ValueError):
    """A picture that cannot be used. The message says why; the caller adds the name."""


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
# Of 16-bit colours Pillow keeps the high byte; with the byte order reversed, it keeps the low one.
_LOW_BYTE = {
    "RGB;16L": "RGB;16B",
    "RGB;16B": "RGB;16L",
    "RGB;16N": "RGB;16B" if sys.byteorder == "little" else "RGB;16L",
}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF's
_NOT_READ = "which is not read: save it as 8- or 16-bit grey or RGB, as PNG or uncompressed TIFF"
# Tags of TIFF 6.0 and their values.
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 254, 258, 262, 277, 284, 338, 339
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # photometric interpretation -> colour samples per pixel
_ALPHA = (1, 2, 999)  # types of extra samples; 999 is Corel Draw's
_NO_PAGE = 1 | 4  # a reduced copy, or a mask
_KINDS = {2: "signed ", 3: "float ", 5: "complex ", 6: "complex "}


def scaled(values: np.ndarray, value_range: Range) -> np.ndarray:
    """Values as uint8: `low` and below become 0, `high` and above 255; linear in between, rounded."""
    low, high = value_range
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        return _scaled(np.arange(2 ** (8 * values.dtype.itemsize)), low, high)[values]
    parts = np.array_split(values, -(-values.size // 2**22) or 1)  # all at once would take several times the memory
    return np.concatenate([_scaled(part, low, high) for part in parts])


def _scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values.astype(np.float64) - low) * 255 / (high - low), 0, 255)).astype(np.uint8)


def check_bands(picture: Image.Image) -> None:
    """Raises BadImage for a TIFF with samples beyond its colours and transparency."""
    tags = getattr(picture, "tag_v2", {})
    samples, extra = tags.get(_SAMPLES, 1), tuple(tags.get(_EXTRA, ()))
    beyond = samples - _COLOURS.get(tags.get(_PHOTOMETRIC, 0), samples)
    if beyond > 0 and not (beyond == len(extra) == 1 and extra[0] in _ALPHA):
        raise BadImage(
            f"{_describe(tags)}, {beyond} beyond its colours, not marked as transparency: save only the colours"
        )


def check_pages(picture: Image.Image) -> None:
    """Raises BadImage for a TIFF with further pages, other than smaller copies and masks."""
    pages = picture.n_frames if picture.format == "TIFF" else 1
    for page in range(1, pages):
        picture.seek(page)
        if not picture.tag_v2.get(_SUBFILE, 0) & _NO_PAGE:
            raise BadImage(f"a TIFF of {pages} pages: save each as a file")
    if pages > 1:
        picture.seek(0)


def deep_type(picture: Image.Image) -> tuple[str, type] | None:
    """Name and NumPy type of values that are not unsigned 8-bit grey or colours, else None.

    Call it before the file is loaded: afterwards only the mode is left, which says less than the header. Raises
    BadImage if Pillow changes the values.
    """
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


def to_eight_bits(picture: Image.Image, deep: tuple[str, type], value_range: Range | None, data: bytes) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3] of a `deep_type`; 16-bit colours are read again from `data`. May raise BadImage."""
    name, dtype = deep
    values = np.asarray(picture)
    if picture.mode == "RGB":
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
    picture = Image.open(io.BytesIO(data))
    for place, tile in enumerate(picture.tile):
        raw, *others = [tile.args] if isinstance(tile.args, str) else tile.args
        args = (_LOW_BYTE[raw], *others)
        picture.tile[place] = tile._replace(args=args if others else args[0])
    return np.asarray(picture)


def describe_unknown(data: bytes) -> str | None:
    """What a TIFF that Pillow cannot open holds; None for other files, or if its tags are unreadable."""
    if data[:4] not in _TIFF:
        return None
    stream = io.BytesIO(data)
    try:
        tags = ImageFileDirectory_v2(data[:16] if b"+" in data[2:4] else data[:8])
        stream.seek(tags.next)
        tags.load(stream)
        return f"{_describe(tags)}, {_NOT_READ}" if _PHOTOMETRIC in tags else None
    except Exception:  # on damaged files, Pillow raises almost anything
        return None


def _describe(tags: ImageFileDirectory_v2) -> str:
    bits, kind = max(tags.get(_BITS, (1,))), _KINDS.get(tags.get(_SAMPLE_FORMAT, (1,))[0], "")
    samples = tags.get(_SAMPLES, 1)
    white = ", of which 0 is white" if tags.get(_PHOTOMETRIC) == 0 else ""
    planes = ", plane by plane" if samples > 1 and tags.get(_PLANAR) == 2 else ""
    return f"a TIFF of {samples} x {bits}-bit {kind}numbers a pixel{white}{planes}"
