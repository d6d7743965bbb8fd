"""From encoded bytes or arrays to uint8 pictures: colour modes, orientation, transparency, and what is refused."""

import io

import numpy as np
from PIL import Image, ImageCms

from mae_jax.errors import UserError

# What pictures for training come in. Pillow knows more formats, some of which start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")

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


class BadImage(ValueError):
    """A picture that cannot be used. The message says why; the caller knows the name."""


def decode(data: bytes | np.ndarray, channels: int, max_pixels: int) -> np.ndarray:
    """Returns the picture as uint8 [h, w, channels].

    Encoded bytes become what a viewer shows on white paper: turned as the EXIF orientation says, transparency
    over white, 16-bit and float greys scaled to 0..255, the first frame of an animation; `channels` 1 gives the
    luminance (ITU-R 601). Arrays are taken as they are; grey is repeated to 3 channels, and 3 become 1.

    Args:
      data: an encoded picture, or uint8 [h, w] or [h, w, c].
      channels: wanted; 1 or 3 for encoded pictures, any number for arrays.
      max_pixels: width x height above which an encoded picture is refused, before it is decoded. Pillow refuses
        those above 178,956,970 on its own account.

    Raises:
      BadImage: empty, truncated, unknown or too large.
      UserError: the channels of the data set cannot become `channels`.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, channels)
    if channels not in (1, 3):
        raise UserError(f"encoded pictures have 1 or 3 channels, but model.channels={channels}: set it to 3")
    if not data:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            if picture.width * picture.height > max_pixels:
                raise BadImage(f"{picture.width} x {picture.height} pixels are more than data.max_pixels={max_pixels}")
            picture.load()
            return to_array(picture, channels)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"absurdly large: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"not a picture in any of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # on damaged files, Pillow raises almost anything
        raise BadImage(f"damaged: {error}" if str(error) else f"damaged: {type(error).__name__}") from error


def to_array(picture: Image.Image, channels: int) -> np.ndarray:
    """uint8 [h, w, channels] of a loaded picture of any mode, turned as its EXIF orientation says; see `decode`."""
    return _from_array(_to_eight_bits(_upright(picture)), channels)


def _from_array(image: np.ndarray, channels: int) -> np.ndarray:
    """uint8 [h, w] or [h, w, c] -> uint8 [h, w, channels]."""
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.dtype != np.uint8:
        raise UserError(f"the data give an array {image.dtype}{list(image.shape)}, not a picture uint8 [h, w, c]")
    if image.shape[2] == channels:
        return image
    if image.shape[2] == 1 and channels == 3:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] == 3 and channels == 1:
        return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    raise UserError(
        f"the pictures have {image.shape[2]} channels, but model.channels={channels}: "
        f"set model.channels to {image.shape[2]}"
    )


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG)
    except Exception:  # a damaged EXIF block does not spoil the picture
        orientation = None
    transpose = _TRANSPOSE.get(orientation)
    return picture if transpose is None else picture.transpose(transpose)


def _to_eight_bits(picture: Image.Image) -> np.ndarray:
    """Any Pillow mode -> uint8 [h, w] (grey) or [h, w, 3] (RGB)."""
    mode = picture.mode
    if mode.startswith("I;16"):
        return _scaled(np.asarray(picture), 65535)
    if mode == "I":
        # 32 bits, in which Pillow mostly keeps 16-bit greys.
        values = np.asarray(picture)
        return _scaled(values, 65535 if values.max() <= 65535 else 2**31 - 1)
    if mode == "F":
        return _scaled_float(np.asarray(picture))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
    if mode in ("1", "L"):
        return np.asarray(picture.convert("L"))
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return np.asarray(ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB"))
    return np.asarray(picture if mode == "RGB" else picture.convert("RGB"))  # to convert RGB would copy it


def _scaled(values: np.ndarray, white: int) -> np.ndarray:
    return np.clip(np.round(values * (255 / white)), 0, 255).astype(np.uint8)


def _scaled_float(values: np.ndarray) -> np.ndarray:
    """Floats carry no scale; the usual ones for white are 1, 255 and 65535, and the values tell which."""
    if not np.isfinite(values).all():
        raise BadImage("has values that are not finite")
    white = next((white for white in (1, 255, 65535) if values.max() <= white), None)
    if white is None:
        raise BadImage(f"has float values up to {values.max():g}, a scale that is not known")
    return _scaled(values, white)
