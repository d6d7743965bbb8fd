"""Batches on the devices: read on the host, or cut out of pictures that live on the devices."""

import collections
import functools
from collections.abc import Callable, Collection, Iterator

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.loader import make_eval_batches, make_train_batches
from mae_jax.data.resident import ResidentBatches, can_be_resident, read_all
from mae_jax.data.resolutions import Stage, size_at, sizes_from
from mae_jax.data.sources import Source
from mae_jax.runtime.console import say
from mae_jax.runtime.mesh import batch_parts, batch_sharding, process_share, put_batch
from mae_jax.runtime.signals import look


class DeviceBatches(Iterator[dict[str, jax.Array]]):
    """Endless batches on the devices from `ahead`; `batches` is their source, with `bad_images` and `close()`."""

    def __init__(self, batches: Iterator[dict], ahead: Iterator[dict]):
        self._batches, self._ahead = batches, ahead

    @property
    def bad_images(self) -> dict[int, str]:
        """Indices in the source -> names, for the bad pictures that this process has found so far."""
        return self._batches.bad_images

    def __next__(self) -> dict[str, jax.Array]:
        return next(self._ahead)

    def close(self) -> None:
        self._batches.close()


def to_devices(batches: Iterator[dict], mesh: Mesh, prefetch: int) -> Iterator[dict]:
    """Splits each batch over the devices, up to `prefetch` batches ahead."""
    return prefetch_to_device(batches, functools.partial(put_batch, sharding=batch_sharding(mesh)), prefetch)


def on_devices(batches: Iterator[dict], mesh: Mesh, names: Collection[str], prefetch: int) -> DeviceBatches:
    """Splits the arrays `names` of each batch over the devices."""
    wanted = ({name: batch[name] for name in names} for batch in batches)
    return DeviceBatches(batches, to_devices(wanted, mesh, prefetch))


def training_batches(
    source: Source,
    data: ConfigDict,
    image_size: tuple[int, int],
    channels: int,
    mesh: Mesh,
    names: Collection[str],
    *,
    stages: tuple[Stage, ...],
    steps: range,
) -> DeviceBatches:
    """The `names` of `make_train_batches` for a run's steps, read on the host or cut out of pictures on the devices."""
    sizes, size_of = sizes_from(stages, steps.start), functools.partial(size_at, stages)
    if can_be_resident(source, data, channels, sizes, len(steps) * data.batch_size):
        if not source.in_memory:
            say(f"  data      reads {len(source):,} pictures, to keep them on the device (data.on_device)")
        found = read_all(source, data, channels)
        batches = ResidentBatches(*found, data, mesh, names=tuple(names), size_at=size_of, start_step=steps.start)
        return DeviceBatches(batches, prefetch_to_device(batches, lambda batch: batch, data.prefetch_batches))
    index, count = process_share(mesh)
    batches = make_train_batches(
        source, data, image_size, channels,
        size_at=size_of, start_step=steps.start, process_index=index, process_count=count,
    )  # fmt: skip
    return on_devices(batches, mesh, names, data.prefetch_batches)


def evaluation_batches(
    source: Source, data: ConfigDict, batch_size: int, image_size: tuple[int, int], channels: int, mesh: Mesh
) -> Iterator[dict]:
    """The batches of `make_eval_batches` on the devices; see `evaluation_batch_size`."""
    index, count = process_share(mesh)
    batches = make_eval_batches(
        source, data, evaluation_batch_size(batch_size, len(source), mesh), image_size, channels,
        process_index=index, process_count=count,
    )  # fmt: skip
    return to_devices(batches, mesh, data.prefetch_batches)


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
