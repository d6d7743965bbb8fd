import pytest

from configs import common
from mae_jax.objectives.objective import settle_batch_size
from tests.meshes import device_mesh


def batch_size(num_train, mesh=None, asked=None, parts=1, pairs=False):
    config = common.get_config()
    config.data.batch_size, config.train.accumulate_steps = asked, parts
    settle_batch_size(config, num_train, mesh or device_mesh(), pairs)
    return config.data.batch_size


@pytest.mark.parametrize(
    "pictures, expected",
    [(1, 1), (10, 8), (100, 16), (600, 32), (1437, 64), (3000, 128), (50_000, 256), (1_281_167, 256)],
)
def test_a_batch_that_is_left_open_follows_the_number_of_pictures(pictures, expected):
    assert batch_size(pictures) == expected


def test_it_can_be_split_over_devices_parts_and_pairs():
    assert batch_size(100, device_mesh(8), pairs=True) == 16
    assert batch_size(100, device_mesh(8), parts=2, pairs=True) == 32
    assert batch_size(3000, device_mesh(3)) == 126


def test_a_batch_that_is_given_stays():
    assert batch_size(100, asked=7) == 7
