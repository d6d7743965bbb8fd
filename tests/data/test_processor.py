import contextlib
import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import digits
from mae_jax.data.augment import normalize
from mae_jax.data.loader import make_eval_batches
from mae_jax.data.processor import Processor
from mae_jax.runtime.errors import UserError
from tests.data.conftest import png_16_bit

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (40, 60, 3), np.uint8)
PROCESSOR = Processor((16, 24), 3)


def test_a_picture_is_prepared_as_in_evaluation():
    class Source:
        num_classes, class_names, in_memory, picture_size = 0, None, False, None

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": PICTURE, "label": -1}

    data = digits.get_config().data
    data.update(eval_crop=0.875)
    batches = make_eval_batches(Source(), data, 1, (16, 24), 3)
    batch = next(batches)
    batches.close()
    expected = normalize(jnp.asarray(batch["image"]), PROCESSOR)
    np.testing.assert_array_equal(PROCESSOR(PICTURE), expected)


def test_pil_images_arrays_floats_and_files_of_one_picture_become_the_same_images(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    expected = PROCESSOR(PICTURE)
    assert expected.shape == (1, 16, 24, 3) and expected.dtype == np.float32
    for same in (
        Image.fromarray(PICTURE), tmp_path / "picture.png", str(tmp_path / "picture.png"),
        PICTURE / 255, (PICTURE / 255).astype(np.float32), [PICTURE], PICTURE[None],
    ):  # fmt: skip
        np.testing.assert_array_equal(PROCESSOR(same), expected)
    several = PROCESSOR([PICTURE, Image.fromarray(PICTURE), tmp_path / "picture.png"])
    np.testing.assert_array_equal(several, np.repeat(expected, 3, axis=0))
    assert PROCESSOR([PICTURE, PICTURE[:20]]).shape == (2, 16, 24, 3)  # of different sizes


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_become_rgb_or_grey(mode):
    grey = Image.fromarray(PICTURE).convert("L")
    picture = grey.convert(mode)
    assert PROCESSOR(picture).shape == (1, 16, 24, 3)
    one = Processor((16, 24), 1, (0.5,), (0.5,))
    assert one(picture).shape == (1, 16, 24, 1)
    if mode == "L":
        np.testing.assert_array_equal(one(picture), one(np.asarray(grey)))


def test_the_orientation_of_a_photograph_is_heeded():
    tagged = Image.fromarray(PICTURE)
    exif = tagged.getexif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    tagged.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(PROCESSOR(Image.open(file)), PROCESSOR(PICTURE[::-1, ::-1]))


def test_images_become_the_pictures_that_they_were_made_of():
    processor = Processor((40, 60), 3, eval_crop=1.0)
    pictures = processor.to_pictures(processor(PICTURE))
    assert pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures[0], PICTURE)
    np.testing.assert_array_equal(processor.to_pictures(np.full((1, 2, 2, 3), 99.0)), np.full((1, 2, 2, 3), 255))


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ([], "no pictures"),
        (np.zeros((4, 4, 4), np.uint8), "4 channels"),
        (np.zeros((4, 4, 3), np.int32), "array of int32"),
        (np.full((4, 4, 3), 200.0), "values from 200 to 200"),
        (np.full((4, 4, 3), np.nan), "values that are not finite"),
        (np.zeros((3, 96, 96), np.uint8), r"\[3, 96, 96\] has 96 channels.*if its channels are first.*moveaxis"),
        (np.zeros((2, 3, 96, 96), np.float32), r"\[3, 96, 96\] has 96 channels.*channels are first"),
        (np.zeros((1, 96, 96), np.uint8), "channels are first"),
        (np.zeros((4, 96, 96), np.uint8), "channels are first"),
        (np.zeros((0, 4, 4, 3), np.uint8), "no pictures"),
        (np.zeros((0, 5, 3), np.uint8), r"array uint8\[0, 5, 3\] cannot be used: .* without pixels"),
        (np.zeros((5, 0), np.float32), "without pixels"),
        (np.uint8(3), r"array uint8\[\], not a picture"),
        (None, "array of object"),
        (Image.fromarray(np.zeros((4, 4), np.uint16)), "uint16 among uint8 pictures"),
        ("no/such/file.png", "cannot be used"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(picture, message):
    with pytest.raises(UserError, match=message) as error:
        PROCESSOR(picture)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_picture_is_refused_by_its_name(tmp_path):
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(UserError, match="text.jpg cannot be used"):
        PROCESSOR(tmp_path / "text.jpg")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
def test_a_value_range_scales_arrays_of_any_numbers_pil_images_and_files_alike(tmp_path, dtype):
    low, high = (-50, 100) if dtype in (np.int16, np.float32) else (20, 120)
    grey = RNG.integers(low - 20 if low < 0 else 0, high + 30, (40, 60)).astype(dtype)
    whole = Processor((40, 60), 1, (0.5,), (0.25,), eval_crop=1, value_range=(low, high))
    scaled = (np.clip(grey.astype(float), low, high) - low) / (high - low)
    np.testing.assert_allclose(whole(grey)[0, ..., 0], (scaled - 0.5) / 0.25, rtol=0, atol=1e-6)
    pictures = whole.to_pictures(whole(grey))
    assert pictures.dtype == np.uint8
    np.testing.assert_allclose(pictures[0, ..., 0], scaled * 255, rtol=0, atol=0.501)

    processor = dataclasses.replace(whole, image_size=(16, 24), eval_crop=0.875)
    images = processor(grey)
    picture = Image.fromarray(grey.astype(np.int32) if dtype == np.int16 else grey)
    # 32-bit pictures become floats, which are not rounded after resizing.
    rounding = 0.5 / (high - low) / 0.25 if dtype == np.int16 else 0
    np.testing.assert_allclose(processor(picture), images, rtol=0, atol=rounding + 1e-6)
    picture.save(tmp_path / "picture.tif")
    np.testing.assert_allclose(processor(tmp_path / "picture.tif"), images, rtol=0, atol=rounding + 1e-6)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
@pytest.mark.parametrize("value_range", [None, (100, 3000)])
def test_deep_pictures_of_many_channels_are_prepared_as_in_evaluation(make_config, dtype, value_range):
    class Source:
        num_classes, class_names, in_memory, picture_size = 0, None, False, None

        def __len__(self):
            return len(pictures)

        def __getitem__(self, index):
            return {"image": pictures[index], "label": -1}

    pictures = RNG.integers(0, 4096, (3, 20, 30, 13)).astype(dtype)
    if dtype == "float32":
        pictures[1, :9, :9] = np.nan
    unit = 1 if value_range else 4000
    mean, std = tuple(unit * np.linspace(0.3, 0.6, 4)), (0.1 * unit,)
    settings = dict(eval_crop=0.875, value_range=value_range, dtype=dtype, bands=(11, 3, 0, 3), mean=mean, std=std)
    data = make_config(**settings)
    with contextlib.closing(make_eval_batches(Source(), data, 3, (8, 12), 4)) as batches:
        raw = next(batches)["image"]
    processor = Processor((8, 12), 4, mean, std, 0.875, value_range, dtype, (11, 3, 0, 3))
    images = processor(pictures)
    np.testing.assert_array_equal(images, normalize(jnp.asarray(raw), data))
    np.testing.assert_array_equal(processor.valid_values(pictures), ~np.isnan(raw))
    assert np.isfinite(images).all() and raw.dtype == dtype
    shown = np.asarray(processor.to_pictures(images))
    if value_range:
        assert shown.dtype == np.uint8
    else:  # in the data's own units
        np.testing.assert_allclose(shown, np.where(np.isnan(raw), mean, raw), rtol=1e-5)


def test_numbers_that_the_training_type_lacks_are_taken_as_floats_with_their_no_data():
    picture = np.full((4, 4), 300.25)
    picture[0, 0] = np.nan
    for value_range, mean, std, expected in (((200, 400), 0.5, 0.25, 0.005), (None, 300.0, 50.0, 0.005)):
        images = np.asarray(Processor(4, 1, mean, std, 1.0, value_range, "uint16")(picture)).reshape(-1)
        assert images[0] == 0
        np.testing.assert_allclose(images[1:], expected, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [dict(value_range=(5, 5)), dict(value_range=(0, np.nan)), dict(value_range=3), dict(value_range=(1, 2, 3)),
     dict(std=0.0), dict(eval_crop=1e-9), dict(eval_crop=np.nan), dict(image_size=0), dict(image_size=10**8),
     dict(image_size=(16,)), dict(image_size=16.0), dict(dtype="int32"), dict(dtype=5), dict(bands=(0, 1)),
     dict(bands=(0, 1, -1)), dict(bands=2)],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused_by_their_name(settings):
    (name,) = settings
    with pytest.raises(UserError, match=f"{name}=.* must be"):
        Processor(**{"image_size": 4} | settings)


def test_floats_that_are_not_finite_are_refused_whatever_the_range():
    picture = np.full((4, 4), np.nan)
    with pytest.raises(UserError, match="a float array with values that are not finite"):
        Processor((4, 4), value_range=(0, 1))(picture)


def test_what_pillow_has_halved_to_8_bits_is_refused_unless_its_path_is_given(tmp_path):
    (tmp_path / "deep.png").write_bytes(png_16_bit(np.full((4, 4, 3), 4095)))
    with pytest.raises(UserError, match="deep.png cannot be used: 16-bit RGB, of which Pillow keeps 8 bits"):
        PROCESSOR(Image.open(tmp_path / "deep.png"))
    images = Processor((4, 4), value_range=(0, 4095), eval_crop=1)(tmp_path / "deep.png")
    np.testing.assert_array_equal(images, Processor((4, 4), eval_crop=1)(np.full((4, 4, 3), 255, np.uint8)))
