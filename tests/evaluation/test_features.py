import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.evaluation.features import extract_features, pool
from mae_jax.evaluation.representations import measure_features

SETTINGS = ConfigDict(dict(knn_k=3, knn_temperature=0.07, linear_probe=True, probe_c=1.0))
MESH = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))


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
    ours, our_labels = extract_features(lambda batch: batch["image"] * 2, batches(features, labels, 3))
    np.testing.assert_array_equal(ours, features * 2)
    np.testing.assert_array_equal(our_labels, labels)


def test_separable_classes_are_told_apart_and_shuffled_labels_are_not():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=400)
    features = (4 * np.eye(4)[labels] + rng.normal(size=(400, 4))).astype(np.float32)
    train, test = (features[:200], labels[:200]), (features[200:], labels[200:])
    scores = measure_features(lambda b: b["image"], batches(*train, 64), batches(*test, 64), 4, SETTINGS, MESH)
    assert scores["knn/top1"] > 0.9 and scores["linear_probe/top1"] > 0.9
    without = SETTINGS.copy_and_resolve_references()
    without.linear_probe = False
    assert measure_features(lambda b: b["image"], batches(*train, 64), batches(*test, 64), 4, without, MESH) == {
        "knn/top1": scores["knn/top1"]
    }
    chance = measure_features(
        lambda b: b["image"], batches(train[0], rng.permutation(train[1]), 64), batches(*test, 64), 4, SETTINGS, MESH
    )
    assert chance["knn/top1"] < 0.45 and chance["linear_probe/top1"] < 0.45
