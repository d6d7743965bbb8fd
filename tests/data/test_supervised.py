import itertools

import jax
import numpy as np
import pytest

from mae_jax.data.augment import augment, augmentations, soft_targets
from mae_jax.data.loader import make_train_batches
from mae_jax.data.sources import make_source

OFF = dict(crop_rule="centre", flip=False, augmentation="none", color_jitter=0.0, erasing=0.0, mixup=0.0, cutmix=0.0)
ON = [
    dict(crop_rule="retry"), dict(crop_rule="clip"), dict(flip=True), dict(augmentation="rand_augment"),
    dict(color_jitter=0.4), dict(erasing=0.5), dict(mixup=0.8), dict(cutmix=1.0),
]  # fmt: skip


def training_pictures(config, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and targets of one epoch as the loss sees them, by index."""
    batches = make_train_batches(make_source(config, "train", (12, 12), 3), config, (8, 8), 3, start_step=epoch)
    batch = next(batches)
    batches.close()
    order = np.argsort(batch["index"])
    targets = soft_targets(batch["label"][order], 10, 0.0)
    return augment(config, jax.random.split(jax.random.key(epoch), 32), batch["image"][order], targets)


@pytest.mark.parametrize("changes", [{}, *ON], ids=lambda changes: " ".join(changes) or "all off")
def test_what_happens_to_pictures_is_named_and_without_a_name_they_are_the_same_in_every_epoch(make_config, changes):
    config = make_config(**{"name": "synthetic", "num_examples": 32, "batch_size": 32, **OFF, **changes})
    (first, _), (second, _) = (training_pictures(config, epoch) for epoch in range(2))
    assert (len(augmentations(config, of_classifier=True)) == 0) == np.array_equal(first, second)


@pytest.mark.parametrize("changes", ON, ids=" ".join)
def test_each_augmentation_is_named_once(make_config, changes):
    (name,) = augmentations(make_config(**OFF | changes), of_classifier=True)
    words = dict(crop_rule="random crop", augmentation="RandAugment")
    assert name.startswith(words.get(*changes, *changes))


def test_everything_that_is_on_is_named(make_config):
    everything = dict(itertools.chain.from_iterable(changes.items() for changes in ON))
    found = augmentations(make_config(**OFF | everything, crop_scale=(0.08, 1.0)), of_classifier=True)
    assert found == [
        "random crop (0.08, 1.0)", "flip", "RandAugment", "color_jitter 0.4", "erasing 0.5", "mixup 0.8", "cutmix 1.0",
    ]  # fmt: skip


def test_what_is_for_classifiers_only_is_not_named_where_none_is_trained(make_config):
    config = make_config(**OFF | dict(erasing=0.5, mixup=0.8, cutmix=1.0, flip=True))
    assert augmentations(config, of_classifier=False) == ["flip"]


def test_with_everything_off_pictures_are_only_normalised_and_targets_stay(make_config):
    config = make_config(**OFF, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 6, 7, 3), np.uint8)  # an odd number: nothing is paired
    targets = rng.dirichlet(np.ones(4), 5).astype(np.float32)
    found, found_targets = augment(config, jax.random.split(jax.random.key(0), 5), images, targets)
    expected = (images.astype(np.float64) / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)  # a few roundings of values up to 3
    np.testing.assert_array_equal(found_targets, targets)


def test_what_happens_to_an_example_follows_from_its_own_key(make_config):
    config = make_config(**OFF | dict(flip=True, color_jitter=0.4, erasing=1.0))
    rng = np.random.default_rng(0)
    images, targets = rng.integers(0, 256, (6, 16, 16, 3), np.uint8), np.eye(6, dtype=np.float32)
    keys, order = jax.random.split(jax.random.key(0), 6), rng.permutation(6)
    found, _ = augment(config, keys, images, targets)
    moved, moved_targets = augment(config, keys[order], images[order], targets[order])
    np.testing.assert_array_equal(moved, found[order])
    np.testing.assert_array_equal(moved_targets, targets[order])
