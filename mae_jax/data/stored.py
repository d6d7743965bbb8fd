"""Pictures as they are stored: all their channels, in their own type."""

import io

import numpy as np

from mae_jax.data.decoding import open_picture

NUMPY = b"\x93NUMPY"  # the beginning of a .npy file


def as_stored(image: bytes | np.ndarray, max_pixels: int) -> np.ndarray:
    """[h, w, c] of a source's "image", upright; 8-bit pictures as grey or RGB. Raises BadImage."""
    if isinstance(image, bytes) and image.startswith(NUMPY):
        image = np.load(io.BytesIO(image), allow_pickle=False)
    if isinstance(image, np.ndarray):
        return image[:, :, None] if image.ndim == 2 else image
    picture = open_picture(image, 3, max_pixels).whole()
    is_grey = np.array_equal(picture[..., 0], picture[..., 1]) and np.array_equal(picture[..., 0], picture[..., 2])
    return picture[..., :1] if is_grey else picture


def batch_dtype(dtype: str) -> str:
    """The type of a batch of pictures of this type, which keeps all values (but of 32-bit and larger integers)."""
    kept = {"bool": "uint8", "uint8": "uint8", "uint16": "uint16", "int8": "int16", "int16": "int16"}
    return {**kept, "float16": "float16"}.get(dtype, "float32")
