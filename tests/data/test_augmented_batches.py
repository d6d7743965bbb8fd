"""Batches of augmented pictures: what decides them, and that nothing else does."""

import numpy as np
import pytest

from mae_jax.data.loader import make_train_batches
from mae_jax.data.rand_augment import rand_augment
from mae_jax.data.sources import make_source
from mae_jax.data.transforms import Picture, centre_crop, resize_by_pillow
from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import check_colours
from tests.data.conftest import SIZE, assert_same
from tests.data.test_transforms import loop_box

AUGMENTED = {"augmentation": "rand_augment", "rand_augment_ops": 3, "crop_rule": "clip"}


def test_augmentation_changes_the_pictures_and_not_their_order(batches):
    augmented, plain = batches(4, augmentation="rand_augment"), batches(4)
    same = []
    for one, other in zip(augmented, plain, strict=True):
        for key in ("label", "index"):
            np.testing.assert_array_equal(one[key], other[key])
        same.extend((one["image"] == other["image"]).all(axis=(1, 2, 3)))
    assert 0.1 < np.mean(same) < 0.6  # neither of two operations is applied to a quarter, and some change nothing


def test_a_picture_is_augmented_after_the_crop_and_both_follow_from_the_place_alone(make_config):
    config = make_config(name="synthetic", num_examples=40, batch_size=12, mean=(0.5,), seed=7, **AUGMENTED)
    source = make_source(config, "train", (12, 12), 3)
    iterator = make_train_batches(source, config, SIZE, 3, start_step=2)
    batch = next(iterator)
    iterator.close()
    for row, index in enumerate(batch["index"]):
        draws = np.random.Generator(np.random.Philox(key=7, counter=10 * (24 + row))).random((10, 4))
        top, left, height, width = loop_box(12, 12, draws, rule="clip")
        crop = resize_by_pillow(source[index]["image"][top : top + height, left : left + width], SIZE)
        rng = np.random.Generator(np.random.Philox(key=7, counter=[0, 0, 1, 24 + row]))
        np.testing.assert_array_equal(batch["image"][row], rand_augment(crop, rng, 3, 9.0, 0.5, (128, 128, 128)))


def test_the_centre_crop_of_evaluation_can_be_trained_on(batches, make_config):
    source = make_source(make_config(name="synthetic", num_examples=40), "train", (12, 12), 3)
    for batch in batches(4, crop_rule="centre", eval_crop=0.8):
        expected = [centre_crop(Picture(source[i]["image"]), None, SIZE, eval_crop=0.8) for i in batch["index"]]
        np.testing.assert_array_equal(batch["image"], expected)


def test_neither_processes_nor_threads_nor_restarts_change_augmented_batches(batches):
    whole = batches(6, **AUGMENTED)
    assert_same(batches(4, start_step=2, num_threads=1, **AUGMENTED), whole[2:])
    shares = [batches(6, process_index=i, process_count=2, **AUGMENTED) for i in range(2)]
    joined = [{key: np.concatenate([one[key], two[key]]) for key in one} for one, two in zip(*shares, strict=True)]
    assert_same(joined, whole)


def test_augmentation_of_channels_that_it_cannot_see_is_refused_at_once(make_config):
    config = make_config(name="synthetic", batch_size=12, augmentation="rand_augment", mean=(0.5,), std=(0.5,))
    with pytest.raises(
        UserError, match="data.augmentation=rand_augment takes 8-bit pictures of 1 or 3 channels, not model"
    ):
        check_colours(config, 4)
