"""A big matrix of the host, such as the features of a data set, on the devices of a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mae_jax.runtime.mesh import batch_parts, batch_sharding


def block_layout(count: int, parts: int, largest: int) -> tuple[int, int]:
    """(blocks, rows): the fewest equal blocks of at most `largest` rows by which each of `parts` holds its share."""
    share = max(1, -(-count // parts))
    blocks = -(-share // largest)
    return blocks, -(-share // blocks)


def put_rows(rows: np.ndarray, mesh: Mesh, largest: int) -> tuple[jax.Array, int]:
    """Splits rows [N, ...] over the data axes of a mesh, in order, padded with zeros at the end.

    Rows travel block by block into memory that the device keeps, so that a matrix needs its own size on the devices
    and no copy on the host; it may be a memory map.

    Args:
      largest: most rows of a block.

    Returns:
      The global array [parts * blocks * block, ...], and the number of rows of a block.
    """
    parts = batch_parts(mesh)
    blocks, block = block_layout(len(rows), parts, largest)
    shape = (parts * blocks * block, *rows.shape[1:])
    sharding = batch_sharding(mesh)

    def fill(device, index):
        start, stop, _ = index[0].indices(shape[0])
        shard = jnp.zeros((stop - start, *shape[1:]), rows.dtype, device=device)
        for at in range(start, min(stop, len(rows)), block):
            shard = _write(shard, rows[at : min(at + block, stop)], at - start).block_until_ready()
        return shard

    shards = [fill(*item) for item in sharding.addressable_devices_indices_map(shape).items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards), block


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard, rows, start):
    return jax.lax.dynamic_update_slice_in_dim(shard, rows, start, axis=0)
