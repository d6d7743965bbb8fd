from mae_jax.data.device_batches import evaluation_batch_size
from tests.meshes import device_mesh


def test_a_batch_of_evaluation_has_no_more_rows_than_there_are_pictures_but_fills_the_devices():
    sizes = [(256, 50_000), (2**31 - 1, 360), (256, 3), (10, 50_000)]
    assert [evaluation_batch_size(*size, device_mesh(1)) for size in sizes] == [256, 360, 3, 10]
    assert [evaluation_batch_size(*size, device_mesh(8)) for size in sizes] == [256, 360, 8, 16]
