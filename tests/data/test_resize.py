"""Random crops that OpenCV resizes: how near they are to Pillow's, and what stays as it was."""

import importlib.util
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.decoding import BadImage, decode, open_picture
from mae_jax.data.loader import make_eval_batches, make_train_batches
from mae_jax.data.reading import RandomCrop
from mae_jax.data.resident import can_be_resident
from mae_jax.data.sources import make_source
from mae_jax.data.transforms import resize_by_opencv, resize_by_pillow
from mae_jax.runtime.errors import UserError
from tests.data.test_parts import LIMIT, PHOTOGRAPHS, cut, decibels, encode, noise, turned

IMAGENET = Path(__file__).parents[3] / "shared" / "data" / "imagenet256.tar"  # 256 pictures, where they are
BOX = (13, 21, 401, 587)  # of the photographs, which have 427 x 640 pixels


# Measured: 38.9 and 47.0 dB where both sides shrink, 43.4 and 50.3 where both stay nearly as they are, 43.4 and 50.8
# where both grow, 41.4 and 49.4 where one shrinks.
@pytest.mark.parametrize("file", PHOTOGRAPHS, ids=lambda file: file.stem)
@pytest.mark.parametrize("size, least", [((224, 224), 38), ((400, 580), 43), ((500, 700), 43), ((224, 700), 38)])
def test_opencv_is_near_pillows_bicubic(file, size, least):
    whole = Image.open(file).convert("RGB")
    part = open_picture(file.read_bytes(), 3, LIMIT).part(BOX, size, "opencv")
    assert part.dtype == np.uint8 and part.shape == (*size, 3)
    assert decibels(part, cut(whole, BOX, size)) > least


@pytest.mark.skipif(not IMAGENET.exists(), reason="needs pictures of ImageNet")
def test_random_crops_of_imagenets_pictures_are_as_near_as_another_good_filter():
    crops = {name: RandomCrop((0.2, 1.0), (3 / 4, 4 / 3), 0, resize=name) for name in ("pillow", "opencv")}
    errors = []
    with tarfile.open(IMAGENET) as archive:
        members = [member for member in archive if member.name.lower().endswith((".jpg", ".jpeg"))][::4]
        for place, member in enumerate(members):
            data = archive.extractfile(member).read()
            one, other = (crop(open_picture(data, 3, LIMIT), place, (224, 224)) for crop in crops.values())
            errors.append(((one.astype(float) - other) ** 2).mean())
    assert len(errors) == 64
    assert 10 * np.log10(255**2 / np.mean(errors)) > 42  # 42.9


@pytest.mark.parametrize("shape", [(30, 21, 1), (30, 21, 3), (30, 21, 4), (30, 21, 13)])
@pytest.mark.parametrize("size", [(10, 7), (45, 40), (20, 30)])
def test_any_number_of_channels_is_resized_like_each_alone(shape, size):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    resized = resize_by_opencv(image, size)
    assert resized.shape == (*size, shape[2]) and resized.dtype == np.uint8
    alone = np.concatenate([resize_by_opencv(image[:, :, [channel]], size) for channel in range(shape[2])], axis=2)
    np.testing.assert_array_equal(resized, alone)


def test_a_mean_over_whole_blocks_is_exact():
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    means = image.reshape(6, 2, 5, 4, 3).mean((1, 3))
    np.testing.assert_allclose(resize_by_opencv(image, (6, 5)), means, atol=0.5)


def test_it_does_not_move_what_it_resizes():
    ramp = np.broadcast_to(np.linspace(0, 255, 301).round().astype(np.uint8)[:, None, None], (301, 40, 3))
    for size in ((100, 20), (299, 40), (450, 60)):
        inner = slice(5, size[0] - 5)  # at the borders filters differ
        np.testing.assert_allclose(
            resize_by_opencv(ramp, size)[inner], resize_by_pillow(ramp, size)[inner].astype(float), atol=1
        )


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("RGB", 1), ("L", 3), ("L", 1)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_colours_and_orientation_are_pillows(mode, channels, orientation):
    data = turned(noise().convert(mode), orientation)
    part = open_picture(data, channels, LIMIT).part((3, 5, 40, 31), (17, 20), "opencv")
    whole = decode(data, channels, LIMIT)
    np.testing.assert_array_equal(part, resize_by_opencv(np.ascontiguousarray(whole[3:43, 5:36]), (17, 20)))


def test_what_the_decoder_can_shrink_is_left_to_it_and_pillow():
    data = PHOTOGRAPHS[0].read_bytes()
    small, large = (100, 120), (224, 224)
    shrunk = [open_picture(data, 3, LIMIT).part(BOX, small, name) for name in ("pillow", "opencv")]
    np.testing.assert_array_equal(*shrunk)
    kept = [open_picture(data, 3, LIMIT).part(BOX, large, name) for name in ("pillow", "opencv")]
    assert (kept[0] != kept[1]).any()


def test_a_damaged_picture_is_still_found_out():
    data = encode(noise())
    with pytest.raises(BadImage, match="damaged"):
        open_picture(data[: len(data) // 2], 3, LIMIT).part((0, 0, 50, 61), (40, 40), "opencv")


def test_evaluation_does_not_use_it(make_config):
    images = []
    for resize in ("pillow", "opencv"):
        config = make_config(name="synthetic", num_examples=40, resize=resize)
        source = make_source(config, "eval", (12, 12), 3)
        (batch,) = make_eval_batches(source, config, len(source), (8, 8), 3)
        images.append(batch["image"])
    np.testing.assert_array_equal(*images)


def test_training_batches_have_crops_by_opencv_if_the_settings_say_so(batches):
    (ours,), (same,), (other,) = (batches(1, resize=name) for name in ("opencv", "opencv", "pillow"))
    np.testing.assert_array_equal(ours["image"], same["image"])
    np.testing.assert_array_equal(ours["index"], other["index"])
    assert (ours["image"] != other["image"]).any()


def test_without_the_package_a_line_says_what_to_install(monkeypatch, make_config):
    config = make_config(name="synthetic", num_examples=40, batch_size=12, resize="opencv")
    source = make_source(config, "train", (12, 12), 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install opencv-python-headless, or set data.resize=pillow"):
        make_train_batches(source, config, (8, 8), 3)


def test_pictures_on_the_device_are_resized_as_pillow_does(make_config):
    config = make_config(name="synthetic", num_examples=40, resize="opencv", on_device=True)
    with pytest.raises(UserError, match="data.on_device=True, but data.resize=opencv"):
        can_be_resident(make_source(config, "train", (12, 12), 3), config, 3, [(12, 12)], 40)
