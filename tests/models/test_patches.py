import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.patches import grid_size, patchify, unpatchify
from mae_jax.runtime.errors import UserError
from tests.reference import loop_patches


@pytest.mark.parametrize(("height", "width", "channels", "p"), [(6, 9, 3, 3), (8, 4, 1, 2), (4, 4, 5, 4), (3, 2, 2, 1)])
def test_patches_are_in_row_major_order_with_row_column_channel_inside(height, width, channels, p):
    images = np.arange(2 * height * width * channels, dtype=np.float32).reshape(2, height, width, channels)
    np.testing.assert_array_equal(patchify(jnp.asarray(images), p), loop_patches(images, p))


def test_a_pixel_of_an_image_is_found_at_its_place_in_its_patch():
    images = np.zeros((1, 8, 12, 3), np.float32)
    images[0, 5, 10, 2] = 1  # patch row 1, patch column 2 of 3; inside: row 1, column 2, channel 2
    assert np.argwhere(patchify(jnp.asarray(images), 4)).tolist() == [[0, 1 * 3 + 2, (1 * 4 + 2) * 3 + 2]]


@pytest.mark.parametrize(("height", "width", "channels", "p"), [(6, 9, 3, 3), (8, 4, 1, 2)])
def test_unpatchify_puts_every_patch_back(height, width, channels, p):
    images = np.random.default_rng(0).random((2, height, width, channels), np.float32)
    back = unpatchify(jnp.asarray(loop_patches(images, p)), p, (height // p, width // p))
    np.testing.assert_array_equal(back, images)


def test_a_grid_has_rows_and_columns_in_this_order():
    assert grid_size((32, 48), 16) == (2, 3)


@pytest.mark.parametrize(("size", "p"), [((224, 225), 16), ((225, 224), 16), ((8, 8), 0), ((8, 8), -2), ((0, 8), 2)])
def test_a_patch_size_that_does_not_divide_the_image_is_named(size, p):
    with pytest.raises(UserError, match=rf"patch size {p} .* {size[0]} x {size[1]}"):
        grid_size(size, p)
