"""Batches on the devices: read on the host, or cut out of pictures that live on the devices."""

import collections
import functools
from collections.abc import Callable, Collection, Iterator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.loader import make_eval_batches, make_train_batches
from mae_jax.data.resident import can_be_resident, read_all, resident_batches
from mae_jax.data.resolutions import Stages, size_at, sizes_from
from mae_jax.data.sources import Source
from mae_jax.data.transforms import Size
from mae_jax.runtime.console import say
from mae_jax.runtime.mesh import batch_parts, batch_sharding, process_share, put_batch
from mae_jax.runtime.signals import look


class DeviceBatches(Iterator[dict[str, jax.Array]]):
    """The results of `put_fn` for each of the `batches`, up to `prefetch` of them ahead.

    `bad_images` maps indices in the source to names, for the bad pictures that this process has found so far.
    """

    def __init__(self, batches: Iterator[dict], put_fn: Callable, prefetch: int, bad_images: dict[int, str]):
        self._batches, self.bad_images = batches, bad_images
        self._ahead = prefetch_to_device(batches, put_fn, prefetch)

    def __next__(self) -> dict[str, jax.Array]:
        return next(self._ahead)

    def close(self) -> None:
        self._batches.close()


def on_devices(
    batches: Iterator[dict], mesh: Mesh, prefetch: int, names: Collection[str] | None = None
) -> DeviceBatches:
    """Splits each batch over the devices; `names`: only these of its arrays."""

    def send(batch: dict) -> dict:
        return put_batch({name: batch[name] for name in names or batch}, batch_sharding(mesh))

    return DeviceBatches(batches, send, prefetch, getattr(batches, "bad_images", {}))


def training_batches(
    source: Source, data: ConfigDict, channels: int, mesh: Mesh, names: Collection[str], stages: Stages, steps: range
) -> DeviceBatches:
    """The `names` of `make_train_batches` for a run's steps, read on the host or cut out of pictures on the devices."""
    sizes, size_of = sizes_from(stages, steps.start), functools.partial(size_at, stages)
    if can_be_resident(source, data, channels, sizes, len(steps) * data.batch_size):
        if not source.in_memory:
            say(f"  data      reads {len(source):,} pictures, to keep them on the device (data.on_device)")
        pictures, bad_images = read_all(source, data, channels)
        batches = resident_batches(pictures, data, mesh, names, size_of, steps.start)
        return DeviceBatches(batches, lambda batch: batch, data.prefetch_batches, bad_images)
    batches = make_train_batches(
        source, data, sizes[0], channels, size_at=size_of, start_step=steps.start, share=process_share(mesh)
    )
    return on_devices(batches, mesh, data.prefetch_batches, names)


def evaluation_batches(
    source: Source, data: ConfigDict, batch_size: int, image_size: Size, channels: int, mesh: Mesh
) -> DeviceBatches:
    """The batches of `make_eval_batches` on the devices; see `evaluation_batch_size`."""
    size = evaluation_batch_size(batch_size, len(source), mesh)
    batches = make_eval_batches(source, data, size, image_size, channels, process_share(mesh))
    return on_devices(batches, mesh, data.prefetch_batches)


def evaluation_batch_size(batch_size: int, pictures: int, mesh: Mesh) -> int:
    """`batch_size`, at most `pictures`, rounded up to fill all parts that a batch is split into."""
    parts = batch_parts(mesh)
    return -(-min(batch_size, pictures) // parts) * parts


def prefetch_to_device(batches: Iterator, put_fn: Callable, size: int) -> Iterator:
    """Yields put_fn(batch) in order, with up to `size` further batches already sent to the device.

    `put_fn` must return before the copy is complete, as `jax.device_put` does. Raises Stopped instead of yielding if
    the program was asked to stop and has something to save.
    """
    queue = collections.deque()
    for batch in batches:
        look()
        queue.append(put_fn(batch))
        if len(queue) > size:
            yield queue.popleft()
    while queue:
        yield queue.popleft()
