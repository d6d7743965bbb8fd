"""Masks: drawn for each example, or given by the caller."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from mae_jax.runtime.errors import UserError
from mae_jax.settings.registry import Registry

GRID_RATIO = 0.75  # of grid masks, which keep one patch of each 2 x 2
# BEiT (arXiv 2106.08254, algorithm 1): the smallest block has 16 of 14 x 14 patches.
LEAST_BLOCK = 16 / 196  # share of all patches
BLOCK_ASPECT = 0.3  # the least height / width; the inverse is the greatest
BLOCK_DRAWS = 200


class Mask(NamedTuple):
    """Masks of B examples with L patches, K of them visible."""

    ids_keep: jax.Array  # [B, K] the visible patches
    ids_restore: jax.Array  # [B, L] position of each patch in the shuffled order; visible if < K
    mask: jax.Array  # [B, L] float32; 1 = hidden, 0 = visible
    ids_hidden: jax.Array  # [B, L - K]
    # [B], if numbers of visible patches are known only at run time: the first `count` of ids_keep are visible, which,
    # like ids_hidden, has all L patches.
    count: jax.Array | None = None


MaskFn = Callable[[int, tuple[int, int]], np.ndarray]  # (image index, grid) -> 1 where a patch is hidden

# (keys [B], patches [B, L, p*p*C], (rows, columns), mask ratio, MAEConfig) -> masks with `config.num_visible` patches.
# An example's mask must depend only on its own key and patches, so that it is the same in every batch.
SAMPLERS: Registry[Callable[..., Mask]] = Registry("model.mask_sampling")


def count_visible(grid: tuple[int, int], mask_ratio: float, cell: int = 1, name: str = "mask_ratio") -> int:
    """Visible patches of a grid: int(cells * (1 - ratio)) cells, as released (100 patches, .8 -> 19)."""
    if not 0 <= mask_ratio < 1:
        raise UserError(f"{name}={mask_ratio} is outside [0, 1)")
    visible = cell**2 * int(grid[0] * grid[1] // cell**2 * (1 - mask_ratio))
    if visible < 1:
        raise UserError(f"{name}={mask_ratio} leaves none of {grid[0] * grid[1]} patches visible; lower it")
    return visible


def draw_masks(keys: jax.Array, patches: jax.Array, grid: tuple[int, int], mask_ratio: float, config: Any) -> Mask:
    """Masks of patches [B, L, p*p*C] by `config.mask_sampling`; UserError if it keeps the wrong number of patches."""
    masks = SAMPLERS.find(config.mask_sampling)(keys, patches, grid, mask_ratio, config)
    expected = count_visible(grid, mask_ratio, config.mask_cell)
    if masks.ids_keep.shape != (len(keys), expected):
        raise UserError(
            f"model.mask_sampling={config.mask_sampling}: ids_keep of shape {masks.ids_keep.shape}, but "
            f"{(len(keys), expected)} is needed: int({grid[0] * grid[1]} * (1 - {mask_ratio})) patches stay visible"
        )
    return masks


@SAMPLERS.register("random")
def random_masks(keys: jax.Array, patches: jax.Array, grid: tuple[int, int], mask_ratio: float, config: Any) -> Mask:
    """Hides random patches (section 3), or random cells of `config.mask_cell` patches a side (arXiv 2512.15715)."""
    cells = _cells(grid, config.mask_cell)

    def order(key):
        drawn = jax.random.permutation(key, len(cells))
        return drawn if config.mask_cell == 1 else cells[drawn].reshape(-1)

    return _mask_from_order(jax.vmap(order)(keys), count_visible(grid, mask_ratio, config.mask_cell))


@SAMPLERS.register("grid")
def grid_masks(keys: jax.Array, patches: jax.Array, grid: tuple[int, int], mask_ratio: float, config: Any) -> Mask:
    """Keeps the same patch of every 2 x 2, chosen by the key (paper, Figure 6)."""
    places = _cells(grid, 2).T

    def order(key):
        return jnp.roll(places, jax.random.randint(key, (), 0, 4), axis=0).reshape(-1)

    return _mask_from_order(jax.vmap(order)(keys), places.shape[1])


@SAMPLERS.register("block")
def block_masks(keys: jax.Array, patches: jax.Array, grid: tuple[int, int], mask_ratio: float, config: Any) -> Mask:
    """Hides random rectangles (BEiT, arXiv 2106.08254, algorithm 1; Table 1f); the last is cut to what is missing."""
    keep = count_visible(grid, mask_ratio)
    hide = grid[0] * grid[1] - keep
    rows, columns = np.arange(grid[0])[:, None], np.arange(grid[1])

    def draw(state):
        key, hidden, n = state
        missing = hide - jnp.sum(hidden)
        top, left, height, width = _draw_block(jax.random.fold_in(key, n), grid, missing)
        inside = (top <= rows) & (rows < top + height) & (left <= columns) & (columns < left + width)
        inside |= n == BLOCK_DRAWS - 1  # out of draws (never seen): hide the rest
        new = (inside & ~hidden).reshape(-1)
        new &= jnp.cumsum(new) <= missing
        return key, hidden | new.reshape(grid), n + 1

    def order(key):
        first = draw((key, jnp.zeros(grid, bool), 0))  # on a mesh, a loop's initial value must vary over the devices
        _, hidden, _ = jax.lax.while_loop(lambda state: jnp.sum(state[1]) < hide, draw, first)
        return jnp.argsort(hidden.reshape(-1), stable=True)

    return _mask_from_order(jax.vmap(order)(keys), keep)


def _draw_block(key: jax.Array, grid: tuple[int, int], missing: jax.Array) -> tuple[jax.Array, ...]:
    """(top, left, height, width) of a random rectangle of at most `missing` patches, or of the least size."""
    area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
    least = max(1.0, LEAST_BLOCK * grid[0] * grid[1])
    area = jax.random.uniform(area_key, minval=least, maxval=jnp.maximum(least, missing))
    aspect = jnp.exp(jax.random.uniform(aspect_key, minval=math.log(BLOCK_ASPECT), maxval=-math.log(BLOCK_ASPECT)))
    height = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32).clip(1, grid[0])
    width = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32).clip(1, grid[1])
    top = jax.random.randint(top_key, (), 0, grid[0] - height + 1)
    left = jax.random.randint(left_key, (), 0, grid[1] - width + 1)
    return top, left, height, width


def _cells(grid: tuple[int, int], cell: int) -> jax.Array:
    """The patches of each cell: [cells, cell * cell]."""
    patches = np.arange(grid[0] * grid[1]).reshape(grid)
    return jnp.asarray(rearrange(patches, "(r i) (c j) -> (r c) (i j)", i=cell, j=cell))


def masks_from_noise(noise: jax.Array, mask_ratio: float) -> Mask:
    """Keeps the patches with the smallest noise [B, L] (float32: bfloat16 often coincides); ties go to the earlier."""
    return _mask_from_order(jnp.argsort(noise, axis=1, stable=True), count_visible((1, noise.shape[1]), mask_ratio))


def given_masks(hidden: jax.Array, num_visible: int) -> Mask:
    """Hides the patches where `hidden` [B, L] is not 0; every row has `num_visible` zeros (`check_given_mask`)."""
    return _mask_from_order(jnp.argsort(hidden != 0, axis=1, stable=True), num_visible)


def masks_of_any_number(hidden: jax.Array) -> Mask:
    """`given_masks`, but one compiled program serves every number of visible patches; images may differ in it.

    The encoder then computes all L tokens and attends to the visible ones only, which gives the same numbers.
    """
    ids = jnp.argsort(hidden != 0, axis=1, stable=True)
    mask = (hidden != 0).astype(jnp.float32)
    return Mask(ids, jnp.argsort(ids, axis=1), mask, ids, jnp.sum(hidden == 0, axis=1))


def check_given_mask(mask: np.ndarray | MaskFn, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, int]:
    """A caller's mask (see `MaskedAutoencoder.__call__`) as bool [count, L], and the number of visible patches."""
    num_patches = grid[0] * grid[1]
    shapes = [(num_patches,), grid, (count, num_patches), (count, *grid)]
    if callable(mask):
        masks = [np.asarray(mask(number, grid)) for number in range(count)]
        if wrong := [f"{found.shape} for image {n}" for n, found in enumerate(masks) if found.shape not in shapes[:2]]:
            raise UserError(f"the mask function gives an array of shape {wrong[0]}: {shapes[0]} or {grid} is needed")
        mask = np.stack([found.reshape(-1) for found in masks])
    try:
        mask = np.asarray(mask) != 0
    except jax.errors.TracerArrayConversionError as error:
        raise UserError(
            "a mask's count of visible patches decides shapes: inside jax.jit let mask be a NumPy array from outside"
        ) from error
    if mask.shape not in shapes:
        raise UserError(f"mask of shape {mask.shape}: one of {', '.join(map(str, shapes))} is needed")
    mask = np.broadcast_to(mask.reshape(-1, num_patches), (count, num_patches))
    visible = np.sum(~mask, axis=1)
    if len(np.unique(visible)) != 1 or visible[0] == 0:
        raise UserError(
            f"the masks leave {visible.min()} to {visible.max()} of {num_patches} patches visible; "
            "every image needs the same number, at least one"
        )
    return mask, int(visible[0])


def some_hidden(keys: jax.Array, masks: Mask, count: int) -> jax.Array:
    """A uniformly random set of `count` hidden patches of each example: [B, count]; keys: [B]."""
    if count == masks.ids_hidden.shape[1]:
        return masks.ids_hidden
    return jax.vmap(jax.random.permutation)(keys, masks.ids_hidden)[:, :count]


def _mask_from_order(ids_shuffle: jax.Array, keep: int) -> Mask:
    ids_restore = jnp.argsort(ids_shuffle, axis=1)
    mask = (ids_restore >= keep).astype(jnp.float32)
    return Mask(ids_shuffle[:, :keep], ids_restore, mask, ids_shuffle[:, keep:])


def take_patches(x: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` [B, K] of x [B, L, D], or of one table [L, D] for all examples: [B, K, D]."""
    if x.ndim == 2:
        return x[ids]
    return jnp.take_along_axis(x, ids[:, :, None], axis=1)
