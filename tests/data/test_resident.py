"""Small pictures that live on the devices: the same batches as read one by one."""

import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import common
from mae_jax.data.device_batches import bicubic_table, cut_and_resize, training_batches
from mae_jax.data.loader import Batches, make_train_batches
from mae_jax.data.resolutions import make_stages, size_at
from mae_jax.data.sources import Labelled, Wrapper, make_source, random_subset, stratified_subset
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import make_mesh

NAMES = ("image", "label", "index")


def make_data(**overrides) -> ConfigDict:
    data = common.get_config().data
    with data.unlocked():
        data.update(dict(name="digits", batch_size=16, seed=3) | overrides)
    return data


def batches_of(data, source, size, devices=1, steps=range(1000), resolutions=(), channels=1):
    mesh = make_mesh(ConfigDict(dict(data=devices, fsdp=1, tensor=1)), jax.devices()[:devices])
    stages = make_stages(resolutions, size, len(range(steps.stop)))
    return training_batches(source, data, channels, mesh, NAMES, stages, steps), stages


def fetched(batches, count):
    found = [jax.device_get(next(batches)) for _ in range(count)]
    batches.close()
    return found


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    "crop",
    [{}, {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}, {"crop_rule": "clip"}],
    ids=["crops", "whole", "clip"],
)
def test_the_batches_of_the_device_have_the_bits_of_those_that_are_read(crop, devices):
    source, size = make_source(make_data(), "train", (8, 8), 1), (8, 8)
    on_device, _ = batches_of(make_data(on_device=True, **crop), source, size, devices)
    read, _ = batches_of(make_data(on_device=False, **crop), source, size)
    assert_same(fetched(on_device, 5), fetched(read, 5))


def test_the_same_goes_for_other_sizes_channels_and_a_restart_in_a_later_stage():
    data = make_data(name="synthetic", num_examples=40)
    source = make_source(data, "train", (10, 14), 3)
    options = dict(steps=range(4, 10), resolutions=((0.5, (20, 14)),), channels=3)
    with data.unlocked():
        data.on_device = True
    on_device, stages = batches_of(data, source, (20, 28), **options)
    expected = make_train_batches(source, data, functools.partial(size_at, stages), 3, start_step=4)
    found = fetched(on_device, 4)
    assert {batch["image"].shape[1:3] for batch in found} == {(20, 14), (20, 28)}
    assert_same(found, [next(expected) for _ in range(4)])
    expected.close()


WRAPPERS = {
    "labelled": lambda source, data: Labelled(source, data),
    "a random part": lambda source, data: random_subset(source, 30),
    "a share of each class, labelled": lambda source, data: stratified_subset(Labelled(source, data), 0.5),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name, channels", [("digits", 1), ("synthetic", 3)])
def test_pictures_that_a_classifier_trains_on_live_on_the_device_with_the_same_bits(name, channels, wrap):
    data = make_data(name=name, num_examples=40)
    source = wrap(make_source(data, "train", (8, 8), channels), data)
    on_device, _ = batches_of(data, source, (8, 8), channels=channels)
    assert not isinstance(on_device._reader, Batches)
    data.on_device = False
    read, _ = batches_of(data, source, (8, 8), channels=channels)
    assert_same(fetched(on_device, 5), fetched(read, 5))


@pytest.mark.parametrize("size, out", [((7, 5), (9, 16)), ((6, 6), (6, 6)), ((1, 8), (5, 8))])
def test_every_box_has_the_bits_that_pillow_gives_it(size, out):
    image = np.random.default_rng(0).integers(0, 256, (1, *size, 3), np.uint8)
    edges = [[(low, high) for low in range(side) for high in range(low + 1, side + 1)] for side in size]
    boxes = [(top, left, bottom - top, right - left) for top, bottom in edges[0] for left, right in edges[1]]
    tables = [bicubic_table(longest, side) for longest, side in zip(size, out, strict=True)]
    rows = np.zeros(len(boxes), np.int32)
    found = cut_and_resize(jax.numpy.asarray(image), rows, np.asarray(boxes, np.int32), *tables)
    for (top, left, height, width), resized in zip(boxes, np.asarray(found), strict=True):
        box = Image.fromarray(np.ascontiguousarray(image[0, top : top + height, left : left + width]))
        np.testing.assert_array_equal(resized, np.asarray(box.resize(out[::-1], Image.Resampling.BICUBIC)))


def is_resident(batches):
    batches.close()
    return not isinstance(batches._reader, Batches)


def test_small_pictures_that_are_seen_at_least_once_live_on_the_device_unless_told_otherwise():
    source, size = make_source(make_data(), "train", (8, 8), 1), (8, 8)
    assert is_resident(batches_of(make_data(), source, size, steps=range(90))[0])  # 90 x 16 of 1437 pictures
    assert not is_resident(batches_of(make_data(), source, size, steps=range(89))[0])
    assert is_resident(batches_of(make_data(on_device=True), source, size, steps=range(1))[0])
    assert not is_resident(batches_of(make_data(on_device=False), source, size)[0])


@pytest.mark.parametrize(
    "overrides, size, words",
    [
        ({"crop_rule": "centre"}, (8, 8), "data.crop_rule=centre"),
        ({"augmentation": "rand_augment"}, (8, 8), "data.augmentation=rand_augment"),
        ({}, (4, 4), "made smaller"),
        ({}, (130, 130), "more than 128 pixels"),
    ],
)
def test_what_cannot_live_on_the_device_is_read_and_refused_where_it_was_asked_for(overrides, size, words):
    source = make_source(make_data(), "train", (8, 8), 1)
    assert not is_resident(batches_of(make_data(**overrides), source, size)[0])
    with pytest.raises(UserError, match=f"data.on_device=True, but .*{words}"):
        batches_of(make_data(on_device=True, **overrides), source, size)


def test_a_bad_picture_is_replaced_by_the_same_one_and_told():
    class Spoilt(Wrapper):
        def __getitem__(self, index):
            return {"image": b"no picture", "label": 0} if index == 7 else super().__getitem__(index)

    source = Spoilt(make_source(make_data(), "train", (8, 8), 1))
    on_device, _ = batches_of(make_data(on_device=True), source, (8, 8))
    read, _ = batches_of(make_data(on_device=False), source, (8, 8))
    found = [next(on_device) for _ in range(90)]
    assert_same([jax.device_get(batch) for batch in found], [jax.device_get(next(read)) for _ in range(90)])
    assert on_device.bad_images.keys() == {7} and 7 not in np.concatenate([batch["index"] for batch in found])
    read.close()
