import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.masking import count_visible, masks_from_noise, take_patches
from tests.reference import drawn_masks


# The released models round down in floating point: 100 * (1 - 0.8) is 19.999...
@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [(100, 0.8, 19), (225, 0.8, 44), (100, 0.9, 9), (256, 0.75, 64)]
    + list(zip([196] * 10, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9],
               [176, 156, 137, 117, 98, 78, 58, 49, 39, 19], strict=True)),
)  # fmt: skip
def test_exactly_the_known_number_of_patches_of_each_example_stays_visible(patches, ratio, visible):
    assert count_visible((1, patches), ratio) == visible
    noise = np.random.default_rng(0).random((5, patches), np.float32)
    masks = masks_from_noise(jnp.asarray(noise), ratio)
    assert masks.ids_keep.shape == (5, visible)
    assert set(np.unique(masks.mask)) == {0, 1}
    np.testing.assert_array_equal(np.sum(masks.mask, axis=1), patches - visible)


@pytest.fixture(scope="module")
def many():
    """4,000 random masks of 16 patches, 12 of them hidden."""
    return jax.jit(lambda keys: drawn_masks(keys, (1, 16), 0.75))(jax.random.split(jax.random.key(3), 4000))


def test_random_masks_hide_as_many_patches_in_every_example(many):
    np.testing.assert_array_equal(np.sum(many.mask, axis=1), 12)


def test_each_patch_is_hidden_as_often_as_any_other(many):
    # Chi-square with 15 degrees of freedom (the 16 counts have a fixed sum); outside these bounds once in 10^5.
    counts = np.sum(many.mask, axis=0)
    chi_square = np.sum((counts - 3000) ** 2) / (4000 * 0.75 * 0.25) * 15 / 16
    assert 1.5 < chi_square < 50


def test_each_pair_of_patches_is_hidden_together_as_often_as_any_other(many):
    # Blocks and grids of patches would fail. 12 * 11 / (16 * 15) = 0.55; standard deviation 31.5; 120 pairs.
    together = np.asarray(many.mask).T @ np.asarray(many.mask)
    assert max(abs(together[i, j] - 2200) for i, j in itertools.combinations(range(16), 2)) < 4.5 * 31.5


def test_no_two_examples_of_a_batch_have_the_same_mask_and_no_two_keys_the_same_batch():
    draw = jax.jit(lambda key: drawn_masks(jax.random.split(key, 64), (14, 14), 0.75).mask)
    masks = np.concatenate([draw(jax.random.key(seed)) for seed in range(3)])
    assert len(np.unique(masks, axis=0)) == 3 * 64


def test_a_mask_depends_on_its_own_key_alone():
    keys = jax.random.split(jax.random.key(0), 6)
    np.testing.assert_array_equal(drawn_masks(keys, (3, 3), 0.5).mask[4], drawn_masks(keys[4:5], (3, 3), 0.5).mask[0])


def test_masks_from_noise_are_an_argsort_of_it():
    noise = np.random.default_rng(1).random((4, 30), np.float32)
    masks = masks_from_noise(jnp.asarray(noise), 0.6)
    order = np.argsort(noise, axis=1)
    np.testing.assert_array_equal(masks.ids_keep, order[:, :12])
    np.testing.assert_array_equal(masks.ids_restore, np.argsort(order, axis=1))
    np.testing.assert_array_equal(masks.mask, [[float(v > sorted(row)[11]) for v in row] for row in noise])


def test_the_earlier_of_patches_with_equal_noise_comes_first():
    masks = masks_from_noise(jnp.asarray([[1.0, 0, 1, 0, 0, 1]]), 0.5)
    assert masks.ids_keep.tolist() == [[1, 3, 4]]
    assert masks.ids_restore.tolist() == [[3, 0, 4, 1, 2, 5]]


def test_ids_restore_puts_shuffled_patches_back(many):
    restore, keep, mask = map(np.asarray, (many.ids_restore, many.ids_keep, many.mask))
    np.testing.assert_array_equal(np.sort(restore, axis=1), np.broadcast_to(np.arange(16), restore.shape))
    np.testing.assert_array_equal(np.take_along_axis(restore, keep, axis=1), np.broadcast_to(np.arange(4), keep.shape))
    np.testing.assert_array_equal(np.take_along_axis(mask, keep, axis=1), 0)


def test_patches_are_taken_example_by_example():
    x, ids = np.random.default_rng(0).random((2, 4, 3)), np.array([[3, 0], [1, 2]])
    expected = [[x[0, 3], x[0, 0]], [x[1, 1], x[1, 2]]]
    np.testing.assert_array_equal(take_patches(jnp.asarray(x, jnp.float32), ids), np.float32(expected))
    from_table = [[x[0, 3], x[0, 0]], [x[0, 1], x[0, 2]]]
    np.testing.assert_array_equal(take_patches(jnp.asarray(x[0], jnp.float32), ids), np.float32(from_table))
