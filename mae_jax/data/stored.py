"""Pictures with all the channels that are stored, whatever a model asks for."""

import io

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.arrays import BadImage, channels_last, fitted, naming_the_damage, read_array
from mae_jax.data.decoding import Encoded, open_picture
from mae_jax.data.files import FORMATS


def as_stored(image: bytes | np.ndarray, data: ConfigDict, channels: int, dtype: str | None = None) -> np.ndarray:
    """A source's "image", upright, [h, w, c] of `dtype` (None: its own `batch_dtype`); raises BadImage.

    8-bit files become grey or RGB, without transparency, unless `data.bands` or a model of other than 1 or 3 channels
    ask for every channel.
    """
    raw = data.bands is not None or channels not in (1, 3)
    array = channels_last(image) if isinstance(image, np.ndarray) else None
    if array is None:
        if not image:
            raise BadImage("the file is empty")
        array = read_array(image, data.max_pixels, bands=data.bands, raw=raw, no_data=data.dtype == "float32")
    if array is None and raw:
        with naming_the_damage():
            array = channels_last(Encoded(Image.open(io.BytesIO(image), formats=FORMATS), channels).stored())
    if array is None:
        array = open_picture(image, 3, data.max_pixels).whole()
        if all(np.array_equal(array[..., 0], array[..., band]) for band in (1, 2)):
            array = array[..., :1]
    return fitted(array, array.shape[2], dtype)
