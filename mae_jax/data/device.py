"""From host batches to batches on the devices."""

import functools
from collections.abc import Iterator

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.loader import make_eval_batches, prefetch_to_device
from mae_jax.data.sources import Source
from mae_jax.mesh import batch_parts, batch_sharding, process_share, put_batch


def to_devices(batches: Iterator[dict], mesh: Mesh, prefetch: int) -> Iterator[dict]:
    """Splits each batch over the devices, up to `prefetch` batches ahead."""
    return prefetch_to_device(batches, functools.partial(put_batch, sharding=batch_sharding(mesh)), prefetch)


def evaluation_batches(
    source: Source, data_config: ConfigDict, batch_size: int, image_size: tuple[int, int], channels: int, mesh: Mesh
) -> Iterator[dict]:
    """The batches of `make_eval_batches` on the devices; `batch_size` is rounded up to fill them evenly."""
    index, count = process_share(mesh)
    batches = make_eval_batches(
        source, data_config, evaluation_batch_size(batch_size, mesh), image_size, channels,
        process_index=index, process_count=count,
    )  # fmt: skip
    return to_devices(batches, mesh, data_config.prefetch_batches)


def evaluation_batch_size(batch_size: int, mesh: Mesh) -> int:
    """The next multiple of the number of parts that a batch is split into."""
    parts = batch_parts(mesh)
    return -(-batch_size // parts) * parts
