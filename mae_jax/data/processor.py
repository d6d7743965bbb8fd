"""Converts users' pictures to a model's images and back."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mae_jax.data.arrays import BadImage, batch_dtype
from mae_jax.data.augment import denormalize, normalize, unit_range
from mae_jax.data.decoding import open_picture
from mae_jax.data.files import read_picture_file
from mae_jax.data.transforms import Range, centre_crop
from mae_jax.runtime.errors import UserError, reason

MAX_SIDE, LEAST_CROP = 2**15, 0.01
MAX_PIXELS = 178_956_970  # Pillow's own limit
DTYPES = ("uint8", "uint16", "int16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Processor:
    """Prepares pictures like a model's evaluation images: resized, centre-cropped, normalised."""

    image_size: int | tuple[int, int] = 224  # pixels: one int, or (height, width)
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # per channel, on [0, 1]; one value serves all
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    eval_crop: float = 0.875  # side of the centre crop / shorter side of the resized picture
    value_range: Range | None = None  # (low, high): black and white of every picture; None: see `data.value_range`
    dtype: str | None = None  # of the pictures, as `data.dtype`; None: uint8, or with a value_range each one's own
    bands: tuple[int, ...] | None = None  # channels of a picture that the model sees; None: all

    def __post_init__(self):
        size, limits = self.image_size, self.value_range
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        fits = len(sides) == 2 and all(isinstance(side, int) and 1 <= side <= MAX_SIDE for side in sides)
        self._check(fits, "image_size", f"one int, or (height, width), from 1 to {MAX_SIDE:,} pixels")
        self._check(LEAST_CROP <= self.eval_crop <= 1, "eval_crop", f"from {LEAST_CROP} to 1")
        two = limits is None or (np.shape(limits) == (2,) and np.isfinite(limits).all() and limits[0] < limits[1])
        self._check(two, "value_range", "(low, high) with low < high")
        object.__setattr__(self, "image_size", sides)
        for name in ("mean", "std"):
            values = getattr(self, name)
            object.__setattr__(self, name, tuple(values) if isinstance(values, list | tuple) else (float(values),))
            one_each = len(getattr(self, name)) in (1, self.channels)
            self._check(one_each, name, f"one number, or one for each of {self.channels} channels")
        self._check(min(self.std) > 0, "std", "above 0")
        self._check(self.dtype in (*DTYPES, None), "dtype", f"one of {', '.join(DTYPES)}")
        bands = self.bands if self.bands is None or isinstance(self.bands, list | tuple) else ("?",)
        whole = bands is None or len(bands) == self.channels and all(type(n) is int and n >= 0 for n in bands)
        self._check(whole, "bands", f"{self.channels} channels, counted from 0")

    def _check(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise UserError(f"{name}={getattr(self, name)} must be {what}")

    def __call__(self, pictures: Any) -> jax.Array:
        """Normalised float32 images [B, H, W, C] of one picture or several.

        A picture is a PIL image, the path or the bytes of a file, or an array [h, w] or [h, w, c]: uint8, or float on
        [0, 1], or any numbers if there is a `value_range` or another `dtype`. Several are a list, or one array
        [b, h, w, c]. Raises UserError for anything else, and for another number of channels.
        """
        arrays = self._arrays(pictures)
        own = self if arrays.dtype == np.uint8 else dataclasses.replace(self, dtype=str(arrays.dtype))
        return normalize(jnp.asarray(arrays), own)

    def valid_values(self, pictures: Any) -> jax.Array:
        """Where the images of these pictures have data: bool [B, H, W, C], for the `valid` of an autoencoder."""
        return jnp.asarray(~np.isnan(self._arrays(pictures)))

    def to_pictures(self, images: jax.Array) -> jax.Array:
        """Pictures uint8 [B, H, W, C] of images [B, H, W, C], clipped at black and white.

        Black and white are the ends of `value_range`. If a model of deeper pictures has none, it returns float32 values
        in the pictures' own units.
        """
        pictures = denormalize(images, self)
        if unit_range(self) == (0, 1) and self.value_range is None:
            return pictures
        return jnp.round(jnp.clip(pictures, 0, 1) * 255).astype(jnp.uint8)

    def _arrays(self, pictures: Any) -> np.ndarray:
        """[B, H, W, C], not yet normalised."""
        several = isinstance(pictures, list | tuple) or getattr(pictures, "ndim", 0) == 4
        arrays = [self._prepare(picture) for picture in (pictures if several else [pictures])]
        if not arrays:
            raise UserError("no pictures: give a PIL image, an array, the path of a file, or a list of them")
        stacked = np.stack(arrays)
        return stacked.astype(batch_dtype(stacked.dtype), copy=False)

    def _prepare(self, picture: Any) -> np.ndarray:
        """[H, W, C] of one picture."""
        name, dtype = getattr(picture, "filename", None) or picture, self.dtype
        name = "the file" if isinstance(picture, bytes) else name
        try:
            if isinstance(picture, str | Path):
                picture = read_picture_file(Path(picture).expanduser())
            elif not isinstance(picture, Image.Image | bytes):
                picture = np.asarray(picture)
                name = f"an array {picture.dtype}{list(picture.shape)}"
                picture = self._values(picture)
                fits = dtype and np.can_cast(batch_dtype(picture.dtype), dtype)
                dtype = dtype if fits else None
            if self.dtype in ("uint8", None) and self.value_range is None:
                dtype = np.uint8
            opened = open_picture(picture, self.channels, MAX_PIXELS, dtype, self.bands)
            return centre_crop(opened, None, self.image_size, eval_crop=self.eval_crop)
        except (BadImage, OSError) as error:
            raise UserError(f"{name} cannot be used: {reason(error)}") from error

    def _values(self, picture: np.ndarray) -> np.ndarray:
        """An array of any numbers, if they have a range or another type, else uint8 of uint8 or floats on [0, 1]."""
        floats = np.issubdtype(picture.dtype, np.floating)
        deep = self.dtype not in ("uint8", None)
        if floats and not (np.isfinite(picture) | (np.isnan(picture) & deep)).all():
            raise UserError("a float array with values that are not finite")
        if (self.value_range or deep) and (floats or np.issubdtype(picture.dtype, np.integer)):
            return picture
        if picture.dtype == np.uint8:
            return picture
        if not floats or (picture.size and not (picture.min() >= 0 and picture.max() <= 1)):
            found = f" with values from {picture.min():g} to {picture.max():g}" if floats else ""
            raise UserError(f"an array of {picture.dtype}{found}: pictures are uint8, or floats on [0, 1]")
        return np.round(picture * 255).astype(np.uint8)
