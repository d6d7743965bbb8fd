import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_jax.data.loader import array_batches, make_train_batches
from mae_jax.data.sources import make_source


@pytest.mark.parametrize(
    ("total", "batch_size", "seed", "start_step"),
    [(40, 12, 0, 0), (40, 12, 0, 5), (40, 12, 3, 1), (7, 7, 1, 2), (9, 1, 0, 30)],
)
def test_arrays_have_the_order_that_pictures_have_from_any_step_on(make_config, total, batch_size, seed, start_step):
    config = make_config(name="synthetic", num_examples=total, batch_size=batch_size, seed=seed)
    pictures = make_train_batches(make_source(config, "train", (4, 4), 1), config, (4, 4), 1, start_step=start_step)
    expected = [batch["index"] for batch in itertools.islice(pictures, 9)]
    pictures.close()
    arrays = {"feature": np.arange(2 * total).reshape(total, 2) * 0.5, "label": np.arange(total)}
    batches = list(itertools.islice(array_batches(arrays, batch_size, seed=seed, start_step=start_step), 9))
    for batch, index in zip(batches, expected, strict=True):
        assert batch.keys() == arrays.keys()
        np.testing.assert_array_equal(batch["label"], index)
        np.testing.assert_array_equal(batch["feature"], arrays["feature"][index])


# The order of very few rows takes long to find.
@given(total=st.integers(30, 60), batch_size=st.integers(1, 40), start_step=st.integers(0, 6))
@settings(deadline=None, max_examples=8)
def test_a_run_that_goes_on_sees_the_batches_of_one_that_never_stopped(total, batch_size, start_step):
    arrays = {"label": np.arange(total)}
    whole = itertools.islice(array_batches(arrays, batch_size, seed=1), start_step, start_step + 3)
    resumed = array_batches(arrays, batch_size, seed=1, start_step=start_step)
    for batch in whole:
        np.testing.assert_array_equal(next(resumed)["label"], batch["label"])


@given(total=st.integers(1, 40), batch_size=st.integers(1, 50))
@settings(deadline=None)
def test_every_row_is_evaluated_once_in_order_and_what_fills_up_has_no_weight(total, batch_size):
    arrays = {"feature": 1 + np.arange(6 * total, dtype=np.float32).reshape(total, 2, 3), "label": 1 + np.arange(total)}
    batches = list(array_batches(arrays, batch_size))
    assert len(batches) == -(-total // batch_size)
    for batch in batches:
        assert batch["feature"].shape == (batch_size, 2, 3) and batch["feature"].dtype == np.float32
        assert batch["label"].shape == batch["weight"].shape == (batch_size,)
        assert batch["weight"].dtype == np.float32
    joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    np.testing.assert_array_equal(joined["weight"], np.arange(len(joined["weight"])) < total)
    for name, array in arrays.items():
        np.testing.assert_array_equal(joined[name][:total], array)
        assert not joined[name][total:].any()


@given(total=st.integers(30, 60), rows=st.integers(1, 5), processes=st.integers(1, 4))
@settings(deadline=None, max_examples=8)
def test_the_rows_of_all_processes_make_up_the_batch_of_one(total, rows, processes):
    arrays, size = {"feature": np.arange(3 * total).reshape(total, 3)}, rows * processes

    def both(share):
        yield from itertools.islice(array_batches(arrays, size, share, seed=1), 3)
        yield from array_batches(arrays, size, share)

    parts = [both((index, processes)) for index in range(processes)]
    for whole, *own in zip(both((0, 1)), *parts, strict=True):
        for name, expected in whole.items():
            assert all(len(part[name]) == rows for part in own)
            np.testing.assert_array_equal(np.concatenate([part[name] for part in own]), expected)
