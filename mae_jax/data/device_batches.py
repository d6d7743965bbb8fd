"""Batches on the devices: read on the host, or cut out of small pictures that all live on the devices.

Both are equal bit for bit: order and boxes are the same, and Pillow's bicubic filter computes in integers.
"""

import collections
import contextlib
import functools
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.loader import ENDLESS, Arrays, SizeAt, index_at, make_eval_batches, make_train_batches, places_of
from mae_jax.data.resolutions import Stages, size_at, sizes_from
from mae_jax.data.sources import Source
from mae_jax.data.transforms import LARGEST_SIDE, Size, crop_draws, sample_crops
from mae_jax.data.workers import call_ahead
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import batch_parts, batch_sharding, process_share, put, put_batch, replicated
from mae_jax.runtime.signals import look

LIMIT = 2 * 2**30  # bytes of all pictures that live on the devices, per device

_PRECISION = 22  # fractional bits of a coefficient, as in Pillow


class DeviceBatches(Iterator[dict[str, jax.Array]]):
    """Batches in order, with up to `prefetch` further ones already taken; for `bad_images` see `Batches`.

    `batches` must not wait for the devices. Raises Stopped if the program was asked to stop and has something to save.
    """

    def __init__(self, batches: Iterator, prefetch: int, reader: Any, bad_images: dict[int, str]):
        self._batches, self._prefetch, self._reader, self.bad_images = batches, prefetch, reader, bad_images
        self._ahead = collections.deque()

    def __next__(self) -> dict[str, jax.Array]:
        for batch in self._batches:
            look()
            self._ahead.append(batch)
            if len(self._ahead) > self._prefetch:
                break
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft()

    def close(self) -> None:
        self._reader.close()


def on_devices(
    batches: Iterator[dict], mesh: Mesh, prefetch: int, names: Collection[str] | None = None
) -> DeviceBatches:
    """Splits each batch over the devices; `names`: only these of its arrays."""
    sent = (put_batch({name: batch[name] for name in names or batch}, batch_sharding(mesh)) for batch in batches)
    return DeviceBatches(sent, prefetch, batches, getattr(batches, "bad_images", {}))


def training_batches(
    source: Source, data: ConfigDict, channels: int, mesh: Mesh, names: Collection[str], stages: Stages, steps: range
) -> DeviceBatches:
    """The `names` of `make_train_batches` for a run's steps, read on the host or cut out of pictures on the devices."""
    sizes, size_of = sizes_from(stages, steps.start), functools.partial(size_at, stages)
    if _can_be_resident(source, data, channels, sizes, len(steps) * data.batch_size):
        if not source.in_memory:
            say(f"  data      reads {len(source):,} pictures, to keep them on the device (data.on_device)")
        pictures, bad_images = read_all(source, data, channels)
        batches = _resident_batches(pictures, data, mesh, names, size_of, steps.start)
        return DeviceBatches(batches, data.prefetch_batches, batches, bad_images)
    batches = make_train_batches(source, data, size_of, channels, steps.start, process_share(mesh))
    return on_devices(batches, mesh, data.prefetch_batches, names)


def evaluation_batch_size(batch_size: int, pictures: int, mesh: Mesh) -> int:
    """`batch_size`, at most `pictures`, rounded up to fill all parts that a batch is split into."""
    parts = batch_parts(mesh)
    return -(-min(batch_size, pictures) // parts) * parts


def _can_be_resident(source: Source, data: ConfigDict, channels: int, sizes: Sequence[Size], examples: int) -> bool:
    """Whether a run's pictures go to the devices: as `data.on_device` says; if unset, where possible and worthwhile.

    With fewer `examples` left to train on than pictures, reading all would not pay. UserError if it is impossible.
    """
    if data.on_device is False or (data.on_device is None and examples < len(source)):
        return False
    size, obstacle = source.picture_size, None
    if data.dtype not in ("uint8", None):
        obstacle = f"the pictures are {data.dtype}, not uint8"
    elif size is None:
        obstacle = "the pictures are not known to have one size"
    elif max(itertools.chain(size, *sizes)) > LARGEST_SIDE:
        obstacle = f"there are pictures with more than {LARGEST_SIDE} pixels a side"
    elif any(height < size[0] or width < size[1] for height, width in sizes):
        obstacle = "the pictures are made smaller, which Pillow does in an order of its own"
    elif len(source) * size[0] * size[1] * channels > LIMIT:
        obstacle = f"the pictures take more than {LIMIT // 2**20:,} MiB"
    elif data.crop_rule == "centre" or data.augmentation != "none":
        obstacle = f"data.crop_rule={data.crop_rule}, data.augmentation={data.augmentation} needs reading one by one"
    if data.on_device and obstacle:
        raise UserError(f"data.on_device=True, but {obstacle}: leave it out")
    return obstacle is None


def read_all(source: Source, data: ConfigDict, channels: int) -> tuple[Arrays, dict[int, str]]:
    """All pictures: "image" uint8 [N, h, w, c], "label" and "index" [N]; and `Batches.bad_images`."""
    data = ConfigDict(data.to_dict() | {"eval_crop": 1.0})
    batches = make_eval_batches(source, data, 64, source.picture_size, channels)
    parts = [{name: rows[batch["weight"] > 0] for name, rows in batch.items()} for batch in batches]
    return {name: np.concatenate([p[name] for p in parts]) for name in ("image", "label", "index")}, batches.bad_images


def _resident_batches(
    pictures: Arrays, data: ConfigDict, mesh: Mesh, names: Collection[str], size_at: SizeAt, start_step: int
) -> Iterator[dict[str, jax.Array]]:
    """The endless batches of `make_train_batches`, cut on the devices out of the pictures of `read_all`."""
    share, (height, width) = process_share(mesh), pictures["image"].shape[1:3]
    total, images = len(pictures["image"]), put(pictures.pop("image"), replicated(mesh))  # the host's memory is free
    cut = jax.jit(cut_and_resize, out_shardings=batch_sharding(mesh))
    take = jax.jit(lambda images, rows: images[rows], out_shardings=batch_sharding(mesh))

    @functools.cache
    def tables(size: Size) -> list[jax.Array]:
        return put([bicubic_table(height, size[0]), bicubic_table(width, size[1])], replicated(mesh))

    def takes_all(size: Size) -> bool:  # the only possible crop is the whole picture
        return {*data.crop_scale, *data.crop_ratio} == {1} and height == width == size[0] == size[1]

    def choose(number: int) -> Arrays:
        """This process's rows of a step: "row" int32 [b], crops "box" int32 [b, 4], labels and indices."""
        places = places_of(start_step + number, data.batch_size, share)
        rows = np.fromiter((index_at(place, total, data.seed) for place in places), np.int32, len(places))
        chosen = {name: pictures[name][rows] for name in names if name != "image"} | {"row": rows}
        if takes_all(size_at(start_step + number)):
            return chosen
        sides = (np.full(len(places), side) for side in (height, width))
        draws = crop_draws(data.seed, places.start, len(places))
        boxes = sample_crops(*sides, draws, data.crop_scale, data.crop_ratio, data.crop_rule)
        return chosen | {"box": boxes.astype(np.int32)}

    # One step ahead, since the order takes a while.
    with contextlib.closing(call_ahead(choose, ENDLESS, workers=0, threads=1, ahead=1)) as ahead:
        for step, chosen in enumerate(ahead, start_step):
            size, batch = size_at(step), put_batch(chosen, batch_sharding(mesh))
            rows, boxes = batch.pop("row"), batch.pop("box", None)
            shown = take(images, rows) if takes_all(size) else cut(images, rows, boxes, *tables(size))
            yield {name: shown if name == "image" else batch[name] for name in names}


def cut_and_resize(
    images: jax.Array, rows: jax.Array, boxes: jax.Array, table_of_rows: jax.Array, table_of_columns: jax.Array
) -> jax.Array:
    """Boxes int32 [b, 4] of images[rows], uint8 [N, h, w, c], enlarged bit for bit as by Pillow: uint8 [b, H, W, c].

    Pillow's bicubic filter does columns first, rounds, then rows. Each direction needs its `bicubic_table`.
    """
    top, left, height, width = boxes.T
    _, image_height, image_width, _ = images.shape
    # Starting at the box's corner; beyond the box the tables are 0.
    ys = jnp.minimum(top[:, None] + jnp.arange(image_height), image_height - 1)
    xs = jnp.minimum(left[:, None] + jnp.arange(image_width), image_width - 1)
    x = images[rows[:, None, None], ys[:, :, None], xs[:, None, :]].astype(jnp.int32)
    columns, lines = table_of_columns[width], table_of_rows[height]
    for product, table in (("bok,bhkc->bhoc", columns), ("bok,bkwc->bowc", lines)):
        x = jnp.clip((jnp.einsum(product, table, x) + (1 << (_PRECISION - 1))) >> _PRECISION, 0, 255)
    return x.astype(jnp.uint8)


def bicubic_table(longest: int, out: int) -> np.ndarray:
    """Coefficients that enlarge n values to `out`, for every n up to `longest`: int32 [longest + 1, out, longest].

    Result o is the sum over k of table[n, o, k] times value k, in units of 2^-22: the filter of Keys (1981, IEEE TASSP
    29, eq. 15) with a = -1/2, rounded as in Pillow. Only for n <= out: otherwise Pillow stretches the filter and
    chooses the order of the directions.
    """
    table = np.zeros((longest + 1, out, longest), np.int32)
    for n in range(1, longest + 1):
        centres = (np.arange(out) + 0.5) * (n / out)
        x, a = np.abs(np.arange(n) - centres[:, None] + 0.5), -0.5
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
        weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights = weights / weights.sum(1, keepdims=True) * (1 << _PRECISION)
        table[n, :, :n] = np.trunc(weights + np.copysign(0.5, weights))
    return table
