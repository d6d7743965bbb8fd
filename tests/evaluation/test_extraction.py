import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.evaluation.evaluator import extract_features, pool


def batches(features, labels, size):
    """The batches of an evaluation: the last one padded with rows of weight 0."""
    for start in range(0, len(features), size):
        real = len(features[start : start + size])
        pad = [(0, size - real)]
        yield {
            "image": np.pad(features[start : start + size], [*pad, (0, 0)], constant_values=99),
            "label": np.pad(labels[start : start + size], pad, constant_values=-1),
            "weight": np.arange(size) < real,
        }


def test_the_mean_is_over_patch_tokens_only_and_class_is_the_first_token():
    tokens = jnp.asarray(np.arange(2 * 3 * 2).reshape(2, 3, 2), jnp.float32)
    np.testing.assert_array_equal(pool(tokens, "mean"), [[3, 4], [9, 10]])
    np.testing.assert_array_equal(pool(tokens, "class"), [[0, 1], [6, 7]])


def test_every_example_gives_one_feature_in_order_and_padding_gives_none():
    features, labels = np.arange(14, dtype=np.float32).reshape(7, 2), np.arange(7)
    ours, our_labels = extract_features(lambda batch: batch["image"] * 2, batches(features, labels, 3), 7)
    np.testing.assert_array_equal(ours, features * 2)
    np.testing.assert_array_equal(our_labels, labels)
    assert ours.dtype == np.float32


def test_a_feature_may_be_many_tokens():
    tokens, labels = np.arange(84, dtype=np.float32).reshape(7, 12), np.arange(7)
    ours, _ = extract_features(lambda batch: batch["image"].reshape(-1, 3, 4), batches(tokens, labels, 3), 7)
    np.testing.assert_array_equal(ours, tokens.reshape(7, 3, 4))


def test_features_can_go_straight_to_a_file(tmp_path):
    features, labels = np.arange(14, dtype=np.float32).reshape(7, 2), np.arange(7)
    out = np.lib.format.open_memmap(tmp_path / "features.npy", "w+", np.float32, (7, 2))
    assert extract_features(lambda batch: batch["image"], batches(features, labels, 3), 7, out)[0] is out
    out.flush()
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), features)


@pytest.mark.parametrize("count", [0, 6, 8])
def test_a_count_that_is_not_the_batches_is_refused(count):
    with pytest.raises(ValueError):
        extract_features(lambda batch: batch["image"], batches(np.zeros((7, 2)), np.zeros(7), 3), count)


def test_a_batch_is_fetched_after_the_next_one_was_started_and_before_the_one_after():
    events = []

    class Result:
        shape = (2, 1)

        def __init__(self, number):
            self.number = number

        def __array__(self, dtype=None, copy=None):
            events.append(f"fetch {self.number}")
            return np.zeros((2, 1), np.float32)

    def feature_fn(batch):
        events.append(f"start {batch['number']}")
        return Result(batch["number"])

    four = (dict(number=i, label=np.zeros(2), weight=np.ones(2)) for i in range(4))
    extract_features(feature_fn, four, 8)
    assert events == [
        "start 0", "start 1", "fetch 0", "start 2", "fetch 1", "start 3", "fetch 2", "fetch 3",
    ]  # fmt: skip
