"""Position tables: fixed sine-cosine, and learned ones resized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache(maxsize=32)
def sincos_table(grid: tuple[int, int], width: int) -> np.ndarray:
    """The 2-D sine-cosine table [1 + L, width] (float32) for a (rows, columns) grid; row 0 (class token) is zero.

    As in the released weights, the first half of the channels (a multiple of 4) encodes the column, the second the row,
    each with sines, then cosines, of frequencies 10000^(-k / (width / 4)). In float64: float32 angles are off by 7e-7.
    """
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [positions.reshape(-1, 1) * frequencies for positions in (columns, rows)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    table = np.concatenate([np.zeros((1, width)), table]).astype(np.float32)
    table.flags.writeable = False  # all callers share the cached array
    return table


def resize_positions(table: jax.Array, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> jax.Array:
    """Resizes a table [1 + L, D] to another (rows, columns) grid, like PyTorch's `interpolate(mode="bicubic")`."""
    if tuple(old_grid) == tuple(new_grid):
        return table
    table = jnp.asarray(table, jnp.float32)
    width = table.shape[1]
    patches = table[1:].reshape(*old_grid, width)
    resized = jax.image.resize(patches, (*new_grid, width), method="cubic-pytorch", antialias=False)
    return jnp.concatenate([table[:1], resized.reshape(-1, width)])
