"""Batches whose pictures have another size from some step on."""

import functools
import hashlib
import itertools

import numpy as np
import pytest
from PIL import Image

from configs import digits
from mae_jax.data import loader
from mae_jax.data.loader import make_train_batches
from mae_jax.data.resolutions import make_stages, size_at
from mae_jax.data.sources import Digits, make_source
from tests.data.conftest import SIZE, assert_same
from tests.data.test_transforms import loop_box

STAGES = make_stages(((0.3, 4), (0.6, (6, 4))), SIZE, 10)
BY_STEP = [(4, 4)] * 3 + [(6, 4)] * 3 + [SIZE] * 4


@pytest.fixture
def grow(batches):
    """`batches` of pictures that grow at steps 3 and 6."""
    return functools.partial(batches, size_at=functools.partial(size_at, STAGES))


def test_the_pictures_of_a_batch_have_the_size_of_its_step(grow):
    assert [batch["image"].shape for batch in grow(10)] == [(12, *size, 3) for size in BY_STEP]


def test_pictures_and_their_order_are_the_same_at_every_size(grow, batches):
    for small, full in zip(grow(10), batches(10), strict=True):
        np.testing.assert_array_equal(small["index"], full["index"])
        np.testing.assert_array_equal(small["label"], full["label"])


def test_the_crop_of_a_place_is_the_same_box_resized_by_pillow_at_every_size(grow, make_config):
    source = make_source(make_config(name="synthetic", num_examples=40), "train", (12, 12), 3)
    for step, batch in enumerate(grow(10)):
        for row, index in enumerate(batch["index"]):
            draws = np.random.Generator(np.random.Philox(key=0, counter=10 * (12 * step + row))).random((10, 4))
            top, left, height, width = loop_box(12, 12, draws)
            box = Image.fromarray(source[int(index)]["image"]).crop((left, top, left + width, top + height))
            expected = box.resize(BY_STEP[step][::-1], Image.Resampling.BICUBIC)
            np.testing.assert_array_equal(batch["image"][row], np.asarray(expected))


@pytest.mark.parametrize("start_step", [1, 3, 5, 6, 8])
def test_a_restart_in_any_stage_goes_on_with_the_same_batches(grow, start_step):
    assert_same(grow(10 - start_step, start_step=start_step), grow(10)[start_step:])


@pytest.mark.parametrize("process_count", [2, 3])
def test_processes_have_their_shares_of_each_stages_batches(grow, process_count):
    shares = [grow(8, process_index=i, process_count=process_count) for i in range(process_count)]
    joined = [{key: np.concatenate([share[key] for share in step]) for key in step[0]}
              for step in zip(*shares, strict=True)]  # fmt: skip
    assert_same(joined, grow(8))


def test_threads_and_pieces_do_not_mix_sizes(grow, monkeypatch):
    whole = grow(8)
    for size in (1, 5):
        monkeypatch.setattr(loader, "MAX_PIECE", size)
        assert_same(grow(8, num_threads=8), whole)


def digits_batches(size_at=None, **where):
    """Five batches of whole digits, 8 x 8 pixels."""
    iterator = make_train_batches(Digits("train"), digits.get_config().data, size_at or SIZE, 1, **where)
    found = list(itertools.islice(iterator, 5))
    iterator.close()
    return found


def test_a_whole_digit_at_half_its_size_is_pillows_antialiased_reduction():
    source = Digits("train")
    for batch in digits_batches(lambda step: (4, 4)):
        for image, index in zip(batch["image"], batch["index"], strict=True):
            whole = Image.fromarray(source[int(index)]["image"][..., 0])
            expected = np.asarray(whole.resize((4, 4), Image.Resampling.BICUBIC))
            np.testing.assert_array_equal(image[..., 0], expected)


def test_the_crop_without_chance_has_the_size_of_the_step_too(make_config):
    config = make_config(name="synthetic", num_examples=40, batch_size=12, crop_rule="centre", eval_crop=1.0)
    source = make_source(config, "train", (12, 12), 3)
    iterator = make_train_batches(source, config, lambda step: (6, 6), 3)
    batch = next(iterator)
    iterator.close()
    for image, index in zip(batch["image"], batch["index"], strict=True):
        whole = Image.fromarray(source[int(index)]["image"])
        np.testing.assert_array_equal(image, np.asarray(whole.resize((6, 6), Image.Resampling.BICUBIC)))


def test_without_stages_the_batches_are_those_of_earlier_versions():
    digest = hashlib.sha256()
    for batch in digits_batches(start_step=20):  # whole digits, so that no resizing takes part
        for name in ("image", "label", "index"):
            digest.update(batch[name].tobytes())
    assert digest.hexdigest() == "cf4e5c6e78456ac892cebe95fdc83382dd76d342cf29aab33c20e38586b3eea3"
