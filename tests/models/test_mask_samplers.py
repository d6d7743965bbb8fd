"""The ways of drawing masks: random patches, cells, blocks and grids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mae_jax.models.masking import BLOCK_DRAWS, Mask, _draw_block, count_visible, some_hidden
from tests.reference import drawn_masks

GRID = 4, 8  # rows, columns
SAMPLERS = {  # on GRID, 24 of 32 patches hidden
    "random": ("random", 1),
    "cells of 2 x 2": ("random", 2),
    "cells of 4 x 4": ("random", 4),
    "blocks": ("block", 1),
    "grid": ("grid", 1),
}
RATIOS = {"cells of 4 x 4": 0.5}
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


@functools.cache
def sampler(grid, ratio, sampling, cell):
    """keys [B] -> Mask, compiled."""
    return jax.jit(lambda keys: drawn_masks(keys, grid, ratio, sampling, cell))


def keys_of(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def sampler_of(name):
    return sampler(GRID, RATIOS.get(name, 0.75), *SAMPLERS[name])


@functools.cache
def many(name) -> Mask:
    """2,000 masks of GRID."""
    return jax.device_get(sampler_of(name)(keys_of(2000)))


# ---------------------------------------------------------------------------------------------- counts and geometry


def sides(unit: int, most: int):
    """Grids that are mostly not square, whose sides `unit` divides."""
    return st.tuples(*[st.integers(1, most).map(lambda n: n * unit)] * 2)


ratios = st.floats(0, 0.9)
draws = st.one_of(
    st.tuples(sides(1, 9), ratios, st.just("random"), st.just(1)),
    st.integers(2, 4).flatmap(lambda cell: st.tuples(sides(cell, 4), ratios, st.just("random"), st.just(cell))),
    st.tuples(sides(1, 9), ratios, st.just("block"), st.just(1)),
    st.tuples(sides(2, 4), st.just(0.75), st.just("grid"), st.just(1)),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@example(draw=((14, 14), 0.75, "block", 1))
@example(draw=((1, 1), 0.0, "block", 1))
@example(draw=((12, 4), 0.7, "random", 4))
@example(draw=((2, 6), 0.75, "grid", 1))
@given(draw=draws)
def test_every_sampler_hides_exactly_the_known_number_of_patches_and_tells_which_in_four_ways_that_agree(draw):
    grid, ratio, sampling, cell = draw
    num_patches = grid[0] * grid[1]
    visible = cell * cell * int((num_patches // (cell * cell)) * (1 - ratio))
    assume(visible)
    assert count_visible(grid, ratio, cell) == visible
    masks = jax.device_get(sampler(grid, ratio, sampling, cell)(keys_of(5)))
    assert masks.ids_keep.shape == (5, visible) and masks.ids_hidden.shape == (5, num_patches - visible)
    order = np.concatenate([masks.ids_keep, masks.ids_hidden], axis=1)
    everything = np.broadcast_to(np.arange(num_patches), order.shape)
    np.testing.assert_array_equal(np.sort(order, axis=1), everything)
    np.testing.assert_array_equal(np.take_along_axis(order, masks.ids_restore, axis=1), everything)
    expected = np.ones((5, num_patches), np.float32)
    np.put_along_axis(expected, masks.ids_keep, 0, axis=1)
    np.testing.assert_array_equal(masks.mask, expected)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(cell=st.integers(2, 4), cells=st.tuples(st.integers(1, 4), st.integers(1, 4)), ratio=ratios)
def test_a_cell_is_hidden_as_a_whole_or_not_at_all(cell, cells, ratio):
    grid = cells[0] * cell, cells[1] * cell
    assume(int(cells[0] * cells[1] * (1 - ratio)))
    masks = sampler(grid, ratio, "random", cell)(keys_of(20))
    by_cell = np.asarray(masks.mask).reshape(20, cells[0], cell, cells[1], cell)
    np.testing.assert_array_equal(by_cell.min((2, 4)), by_cell.max((2, 4)))


def test_a_grid_keeps_one_patch_of_each_2_x_2_at_one_of_four_places_which_are_equally_likely():
    by_cell = many("grid").mask.reshape(-1, 2, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 4)
    visible = by_cell == 0
    np.testing.assert_array_equal(visible.sum(2), 1)
    place = visible.argmax(2)
    np.testing.assert_array_equal(place, np.broadcast_to(place[:, :1], place.shape))
    # Each of 4 places 500 times of 2,000; a deviation is 19.4.
    assert np.abs(np.bincount(place[:, 0], minlength=4) - 500).max() < 4.5 * 19.4


@pytest.fixture(scope="module")
def draw_block():
    return jax.jit(_draw_block, static_argnums=1)


@pytest.mark.parametrize("grid, ratio", [((14, 14), 0.75), ((5, 9), 0.6), ((3, 3), 0.5), ((2, 12), 0.9)], ids=str)
def test_blocks_are_rectangles_one_after_the_other_the_last_cut_to_what_was_missing(draw_block, grid, ratio):
    keys = keys_of(6, seed=1)
    masks = np.asarray(sampler(grid, ratio, "block", 1)(keys).mask).reshape(-1, *grid)
    hide = grid[0] * grid[1] - int(grid[0] * grid[1] * (1 - ratio))
    for key, mask in zip(keys, masks, strict=True):
        hidden, draw = np.zeros(grid, bool), 0
        while hidden.sum() < hide and draw < BLOCK_DRAWS - 1:
            missing = hide - hidden.sum()
            top, left, height, width = map(int, draw_block(jax.random.fold_in(key, draw), grid, missing))
            for row in range(top, top + height):
                for column in range(left, left + width):
                    if hidden.sum() < hide:
                        hidden[row, column] = True
            draw += 1
        assert hidden.sum() == hide
        np.testing.assert_array_equal(mask > 0, hidden)


def test_a_block_has_the_areas_and_aspects_of_beits_and_lies_anywhere_in_the_grid():
    # BEiT, algorithm 1, on 14 x 14 patches: areas from 16 to what is missing, height / width from 0.3 to 1 / 0.3. The
    # largest block here has 50 patches, at most 12.9 high: none is cut to the grid.
    draw = jax.jit(jax.vmap(lambda key: _draw_block(key, (14, 14), 50)))
    top, left, height, width = np.asarray(draw(keys_of(4000)), np.float64)
    assert ((height - 0.5) * (width - 0.5)).max() <= 50 and ((height + 0.5) * (width + 0.5)).min() >= 16
    assert ((height - 0.5) / (width + 0.5)).max() <= 1 / 0.3 and ((height + 0.5) / (width - 0.5)).min() >= 0.3
    # All of these ranges are used, evenly: the mean area is 33 +- 0.16, and rounding adds next to nothing; as many are
    # high as wide.
    assert abs(np.mean(height * width) - 33) < 0.8 and (height * width).min() < 19 and (height * width).max() > 47
    assert abs(np.mean(np.sign(height - width))) < 4.5 / np.sqrt(4000)
    assert np.abs(np.log(height / width)).max() > np.log(3)
    for first, size in ((top, height), (left, width)):
        assert (first >= 0).all() and (first + size <= 14).all()
        share = first[size < 14] / (14 - size[size < 14])  # 0 at one edge, 1 at the other
        assert share.min() == 0 and share.max() == 1 and abs(share.mean() - 0.5) < 0.03


def test_a_block_is_cut_to_the_grid_and_is_of_the_least_size_if_less_is_missing():
    draw = jax.jit(jax.vmap(lambda key: _draw_block(key, (3, 40), 90)))
    top, left, height, width = np.asarray(draw(keys_of(500)))
    assert height.max() == 3 and (top + height).max() == 3 and (left + width).max() == 40
    small = jax.jit(jax.vmap(lambda key: _draw_block(key, (14, 14), 1)))
    _, _, height, width = np.asarray(small(keys_of(500)), np.float64)
    assert ((height + 0.5) * (width + 0.5)).min() >= 16 and ((height - 0.5) * (width - 0.5)).max() <= 16


def borders(masks: np.ndarray) -> np.ndarray:
    """Pairs of neighbours of which one is hidden, in each mask [B, rows, columns]."""
    return np.abs(np.diff(masks, axis=1)).sum((1, 2)) + np.abs(np.diff(masks, axis=2)).sum((1, 2))


def test_what_blocks_hide_hangs_together():
    # Of 364 pairs of neighbours, random masks part 2 x 0.75 x 0.25 = 37 % (137), blocks less than half as many.
    keys = keys_of(200)
    blocks = np.asarray(sampler((14, 14), 0.75, "block", 1)(keys).mask).reshape(-1, 14, 14)
    patches = np.asarray(sampler((14, 14), 0.75, "random", 1)(keys).mask).reshape(-1, 14, 14)
    assert borders(patches).mean() == pytest.approx(364 * 2 * 0.75 * 0.25, rel=0.02)
    assert borders(blocks).mean() < borders(patches).mean() / 2 and borders(blocks).max() < borders(patches).min()


# ------------------------------------------------------------------------------------------------------------ chance


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "blocks"])
def test_each_patch_is_hidden_as_often_as_any_other(name):
    ratio = RATIOS.get(name, 0.75)
    # Binomial counts of 2,000 masks, of 32 patches at most: beyond 4.5 deviations once in 5,000.
    deviation = np.sqrt(2000 * ratio * (1 - ratio))
    assert np.abs(many(name).mask.sum(0) - 2000 * ratio).max() < 4.5 * deviation


@each_sampler
def test_the_masks_of_two_examples_have_nothing_to_do_with_each_other(name):
    masks = many(name).mask
    centred = masks - masks.mean(0)
    for other in (np.roll(centred, 1, axis=0), centred[::-1]):  # neighbours in the batch, and others
        overlap = np.sum(centred * other, axis=1)[:1000]
        assert abs(overlap.mean()) < 4.5 * overlap.std() / np.sqrt(1000)


@pytest.mark.parametrize("name", ["random", "cells of 2 x 2", "blocks"])
def test_other_keys_give_other_masks(name):
    assert len(np.unique(many(name).mask, axis=0)) > {"cells of 2 x 2": 27}.get(name, 1000)  # of 28 with two cells


@each_sampler
def test_a_mask_is_a_function_of_its_key_alone_compiled_or_not(name):
    draw, keys, order = sampler_of(name), keys_of(8, seed=3), np.array([3, 1, 7, 5, 0, 2, 6, 4])
    masks = draw(keys)
    assert masks.count is None  # all have the same number of visible patches
    for found, expected in zip(draw(keys[order])[:4], masks[:4], strict=True):
        np.testing.assert_array_equal(found, np.asarray(expected)[order])
    sampling, cell = SAMPLERS[name]
    alone = drawn_masks(keys[5:6], GRID, RATIOS.get(name, 0.75), sampling, cell)  # op by op
    for found, expected in zip(alone[:4], masks[:4], strict=True):
        np.testing.assert_array_equal(found[0], expected[5])


@each_sampler
def test_shapes_are_known_before_any_key_is(name):
    hidden = int(32 * RATIOS.get(name, 0.75))
    masks = jax.eval_shape(sampler_of(name), jax.eval_shape(lambda: keys_of(7)))
    assert [leaf.shape for leaf in masks[:4]] == [(7, 32 - hidden), (7, 32), (7, 32), (7, hidden)]
    assert [jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in masks[:4]] == [True, True, False, True]


def test_some_of_the_hidden_patches_are_a_uniformly_random_set_without_repetition():
    def draw(keys):
        masks = drawn_masks(keys, (3, 4), 0.75)
        return masks.mask, some_hidden(jax.vmap(jax.random.fold_in, (0, None))(keys, 7), masks, 4)

    mask, ids = jax.device_get(jax.jit(draw)(keys_of(4000)))
    assert ids.shape == (4000, 4) and (np.take_along_axis(mask, ids, axis=1) == 1).all()
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    # Each of 12 patches in a third of the sets: 1,333 +- 29.8.
    assert np.abs(np.bincount(ids.reshape(-1), minlength=12) - 4000 / 3).max() < 4.5 * 29.8


def test_all_of_the_hidden_patches_are_taken_as_they_are():
    masks = drawn_masks(keys_of(3), (3, 4), 0.75)
    assert some_hidden(keys_of(3), masks, 9) is masks.ids_hidden
