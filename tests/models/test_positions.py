import numpy as np
import pytest

from mae_jax.models.positions import sincos_table
from tests.reference import loop_positions


@pytest.mark.parametrize(("rows", "columns", "width"), [(14, 14, 768), (3, 5, 16), (5, 3, 16), (1, 1, 4), (1, 7, 8)])
def test_a_table_is_the_formula_of_any_grid(rows, columns, width):
    # Within half a unit of float32's last place at 1: angles in float32 would be off by 7e-7.
    expected = loop_positions(rows, columns, width)
    np.testing.assert_allclose(sincos_table((rows, columns), width), expected, rtol=0, atol=6e-8)


# Sums of the tables of the released models (their token at row 1, column 2 is that of the next test).
@pytest.mark.parametrize(("width", "total"), [(768, 69594.4939), (512, 46340.3331)])
def test_the_tables_of_the_released_models_have_the_known_sums(width, total):
    table = sincos_table((14, 14), width)
    assert table.shape == (197, width) and table.dtype == np.float32
    assert abs(table.sum(dtype=np.float64) - total) < 1e-3


def test_the_token_of_row_1_column_2_has_the_known_values():
    token = sincos_table((14, 14), 768)[1 + 14 + 2]
    known = {0: 0.909297, 1: 0.94423677, 192: -0.416147, 384: 0.841471}
    np.testing.assert_allclose(token[list(known)], list(known.values()), atol=1e-6)


def test_the_first_half_of_the_channels_encodes_the_column_and_the_second_the_row():
    first, second = np.split(sincos_table((3, 4), 16)[1:].reshape(3, 4, 16), 2, axis=-1)
    np.testing.assert_array_equal(first, np.broadcast_to(first[:1], first.shape))
    np.testing.assert_array_equal(second, np.broadcast_to(second[:, :1], second.shape))
    assert len(np.unique(first[0], axis=0)) == 4 and len(np.unique(second[:, 0], axis=0)) == 3


@pytest.mark.parametrize(("grid", "width"), [((14, 14), 768), ((16, 16), 512), ((40, 3), 4), ((1, 1), 8)])
def test_every_position_has_a_row_of_its_own_and_the_class_token_zeros(grid, width):
    table = sincos_table(grid, width)
    assert len(np.unique(table, axis=0)) == 1 + grid[0] * grid[1]
    assert not table[0].any()


def test_a_table_cannot_be_changed_by_those_who_share_it():
    with pytest.raises(ValueError, match="read-only"):
        sincos_table((2, 2), 8)[1] = 0
