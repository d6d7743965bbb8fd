"""Small data sets that live on the devices, where each batch is cut out of them: no device waits for Python.

The batch of a step has the same bits as the one that `make_train_batches` reads: the order and the boxes are the same,
and so is the arithmetic of Pillow's bicubic filter, which is that of whole numbers.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from mae_jax.data.arrays import own_rows
from mae_jax.data.loader import make_whole_batches
from mae_jax.data.rand_augment import make_augmentation
from mae_jax.data.reading import Shuffled
from mae_jax.data.sources import Source
from mae_jax.data.transforms import CROP_RULES, crop_draws
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import batch_sharding, process_share, put, put_batch, replicated
from mae_jax.runtime.sharding import ROWS, on_shards

LIMIT = 2 * 2**30  # bytes of all pictures, on each device
LARGEST_SIDE = 128  # pixels; a filter's table has the cube of it, 8 MiB

_BICUBIC = -0.5  # Keys's parameter, and
_PRECISION = 22  # bits of a coefficient behind the point, both as Pillow has them


def can_be_resident(
    source: Source, data_config: ConfigDict, channels: int, sizes: list[tuple[int, int]], examples: int
) -> bool:
    """Whether a run's pictures should live on the devices, as `data.on_device` says or else as it pays.

    Args:
      sizes: (height, width) of the pictures that the run trains on.
      examples: that it has still to train on; fewer than there are would not pay for reading all.

    Raises:
      UserError: if `data.on_device` asks for what cannot be.
    """
    wanted = data_config.on_device
    if wanted is False:
        return False
    obstacle = _obstacle(source, data_config, channels, sizes)
    if wanted and obstacle:
        raise UserError(f"data.on_device=True, but {obstacle}: leave it out")
    return obstacle is None and bool(wanted or examples >= len(source))


def _obstacle(source: Source, data_config: ConfigDict, channels: int, sizes: list[tuple[int, int]]) -> str | None:
    size = source.picture_size
    if size is None:
        return "the pictures are not known to have one size"
    if max(itertools.chain(size, *sizes)) > LARGEST_SIDE:
        return f"there are pictures with more than {LARGEST_SIDE} pixels a side"
    if any(height < size[0] or width < size[1] for height, width in sizes):
        return "the pictures are made smaller, which Pillow does in an order of its own"
    if len(source) * size[0] * size[1] * channels > LIMIT:
        return f"the pictures take more than {LIMIT // 2**20:,} MiB"
    if data_config.crop_rule == "centre":
        return "data.crop_rule=centre is for pictures that are read one by one"
    if make_augmentation(data_config, channels):
        return f"data.augmentation={data_config.augmentation} is for pictures that are read one by one"
    return None


class Pictures(NamedTuple):
    """All pictures of a source, as they are."""

    image: np.ndarray  # uint8 [N, h, w, c]
    label: np.ndarray  # int32 [N]
    index: np.ndarray  # int64 [N], of the picture shown, also where it replaces a bad one
    bad_images: dict[int, str]


def read_all(source: Source, data_config: ConfigDict, channels: int) -> Pictures:
    """Reads and decodes all pictures, as training would one by one.

    Raises:
      UserError: for pictures that cannot be used.
    """
    batches = make_whole_batches(source, data_config, source.picture_size, channels)
    parts = [{name: rows[batch["weight"] > 0] for name, rows in batch.items()} for batch in batches]
    arrays = (np.concatenate([part[name] for part in parts]) for name in ("image", "label", "index"))
    return Pictures(*arrays, batches.bad_images)


class ResidentBatches(Iterator[dict[str, jax.Array]]):
    """Endless batches of a source whose pictures are on the devices; those of `make_train_batches`, bit by bit.

    Args:
      names: of what a batch has, of image, label and index.
      size_at: step -> (height, width) of its pictures.

    Attributes:
      bad_images: index in the source -> name, of the pictures found bad.
    """

    def __init__(
        self,
        pictures: Pictures,
        data_config: ConfigDict,
        mesh: Mesh,
        *,
        names: tuple[str, ...],
        size_at: Callable[[int], tuple[int, int]],
        start_step: int = 0,
    ):
        self.bad_images = pictures.bad_images
        self._data, self._mesh, self._names = data_config, mesh, names
        self._size_at, self._step = size_at, start_step
        self._own = own_rows(data_config.batch_size, *process_share(mesh))
        self._order = Shuffled(len(pictures.image), data_config.seed)
        self._picture_size = pictures.image.shape[1:3]
        self._facts = {name: getattr(pictures, name) for name in names if name != "image"}
        self._images = put(pictures.image, replicated(mesh))
        self._cutter = functools.cache(self._make_cutter)
        self._thread = ThreadPoolExecutor(1)  # one step ahead: the order, place by place, takes a while
        self._coming = self._thread.submit(self._choose, start_step)

    def __next__(self) -> dict[str, jax.Array]:
        size, chosen = self._size_at(self._step), self._coming.result()
        self._step += 1
        self._coming = self._thread.submit(self._choose, self._step)
        batch = put_batch(chosen, batch_sharding(self._mesh))
        boxes = (batch.pop("box"),) if "box" in batch else ()
        taken = self._cutter(size)(self._images, batch.pop("row"), *boxes)
        return {name: taken if name == "image" else batch[name] for name in self._names}

    def close(self) -> None:
        """Stops the thread that works ahead."""
        self._thread.shutdown(cancel_futures=True)

    def _choose(self, step: int) -> dict[str, np.ndarray]:
        """What a step takes: "row" int32 [b], "box" int32 [b, 4] unless pictures are taken whole, and the facts."""
        data, (height, width) = self._data, self._picture_size
        places = range(step * data.batch_size, (step + 1) * data.batch_size)[self._own]
        rows = np.fromiter((self._order(place) for place in places), np.int32, len(places))
        chosen = {name: values[rows] for name, values in self._facts.items()} | {"row": rows}
        if self._taken_whole(self._size_at(step)):
            return chosen
        sides = (np.full(len(places), side) for side in (height, width))
        draws = crop_draws(data.seed, places.start, len(places))
        boxes = CROP_RULES[data.crop_rule](*sides, draws, tuple(data.crop_scale), tuple(data.crop_ratio))
        return chosen | {"box": boxes.astype(np.int32)}

    def _taken_whole(self, size: tuple[int, int]) -> bool:
        height, width = self._picture_size
        only_box = {*self._data.crop_scale, *self._data.crop_ratio} == {1}
        return only_box and height == width and (height, width) == tuple(size)

    def _make_cutter(self, size: tuple[int, int]) -> Callable[..., jax.Array]:
        """(images [N, h, w, c], rows [b], boxes [b, 4] or nothing) -> uint8 [b, *size, c], compiled."""
        whole = PartitionSpec()
        if self._taken_whole(size):
            return jax.jit(on_shards(lambda images, rows: images[rows], self._mesh, (whole, ROWS), ROWS))
        tables = [
            put(bicubic_table(longest, out), replicated(self._mesh))
            for longest, out in zip(self._picture_size, size, strict=True)
        ]
        cut = jax.jit(on_shards(cut_and_resize, self._mesh, (whole, ROWS, ROWS, whole, whole), ROWS))
        return lambda images, rows, boxes: cut(images, rows, boxes, *tables)


def cut_and_resize(
    images: jax.Array, rows: jax.Array, boxes: jax.Array, table_of_rows: jax.Array, table_of_columns: jax.Array
) -> jax.Array:
    """Boxes of pictures, made no smaller by Pillow's bicubic filter: columns first, rounded, then rows.

    Args:
      images: uint8 [N, h, w, c].
      rows: int32 [b], of the images.
      boxes: int32 [b, 4]: top, left, height, width.
      table_of_rows, table_of_columns: `bicubic_table` of both directions.

    Returns:
      uint8 [b, H, W, c], with the bits that Pillow gives.
    """
    top, left, height, width = boxes.T
    _, image_height, image_width, _ = images.shape

    def from_corner(image, top, left):  # what comes after the box has no part
        ys = jnp.minimum(top + jnp.arange(image_height), image_height - 1)
        xs = jnp.minimum(left + jnp.arange(image_width), image_width - 1)
        return image[ys][:, xs]

    x = jax.vmap(from_corner)(images[rows].astype(jnp.int32), top, left)
    x = _rounded(jnp.einsum("bok,bhkc->bhoc", table_of_columns[width], x))
    x = _rounded(jnp.einsum("bok,bkwc->bowc", table_of_rows[height], x))
    return x.astype(jnp.uint8)


def _rounded(x: jax.Array) -> jax.Array:
    return jnp.clip((x + (1 << (_PRECISION - 1))) >> _PRECISION, 0, 255)


def bicubic_table(longest: int, out: int) -> np.ndarray:
    """Coefficients that resize n numbers to `out`, for every n up to `longest`: int32 [longest + 1, out, longest].

    A number at the place o of the result is the sum over k of table[n, o, k] times number k, in units of 2^-22. The
    filter is Keys's (1981, IEEE TASSP 29, eq. 15) with a = -1/2, rounded as Pillow rounds it. n <= out: where the
    result is smaller Pillow stretches the filter and picks the order of the directions.
    """
    table = np.zeros((longest + 1, out, longest), np.int32)
    for n in range(1, longest + 1):
        centres = (np.arange(out) + 0.5) * (n / out)
        weights = _keys(np.arange(n) - centres[:, None] + 0.5)  # 0 beyond two places
        weights = weights / weights.sum(1, keepdims=True) * (1 << _PRECISION)
        table[n, :, :n] = np.trunc(weights + np.copysign(0.5, weights))
    return table


def _keys(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), _BICUBIC
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
