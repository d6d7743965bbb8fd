"""Boxes cut out of encoded pictures: the bits of Pillow's, and how near they are where the decoder shrinks."""

import functools
import io
import math
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image, ImageOps

from mae_jax.data.decoding import SPARE, BadImage, open_picture
from mae_jax.data.transforms import Picture, centre_crop, random_crop
from tests.data.conftest import decode

LIMIT = 10**7
PHOTOGRAPHS = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
BOX, SIZE = (3, 5, 40, 31), (17, 20)


def encode(picture: Image.Image, file_format: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, file_format, **options)
    return stream.getvalue()


def turned(picture: Image.Image, orientation: int, **options) -> bytes:
    """A JPEG whose EXIF block says that its pixels lie in this orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(picture, exif=exif, **options)


def noise(height: int = 50, width: int = 61) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def smooth(height: int, width: int) -> Image.Image:
    """Waves so long that every way to shrink them comes to the same, and a shift by half a pixel does not."""
    y, x = 2 * np.pi * np.mgrid[:height, :width]
    waves = [np.sin(y / 197 + x / 171), np.sin(x / 183 - y / 231), np.sin(y / 179)]
    return Image.fromarray((127.5 + 100 * np.stack(waves, axis=2)).round().astype(np.uint8))


def cut(picture: Image.Image, box, size) -> np.ndarray:
    """Pillow's antialiased bicubic of the box alone."""
    top, left, height, width = box
    picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))


def decibels(image: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio."""
    error = float(((image.astype(float) - reference) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_part_has_the_bits_of_pillows_crop_of_the_decoded_picture(file_format, mode, exact):
    data = encode(noise().convert(mode), file_format)
    whole = Image.open(io.BytesIO(data))
    for channels, wanted in ((3, "RGB"), (1, "L")):
        part = open_picture(data, channels, LIMIT).part(BOX, SIZE, exact)
        expected = cut(whole.convert(wanted), BOX, SIZE)
        np.testing.assert_array_equal(part, expected.reshape(*SIZE, channels))
        assert part.dtype == np.uint8


@pytest.mark.parametrize("picture", [
    Image.new("CMYK", (61, 50), (10, 200, 30, 40)), noise().convert("RGBA"), noise().convert("P"), noise().convert("1"),
], ids=lambda picture: picture.mode)  # fmt: skip
def test_a_part_of_a_picture_of_any_mode_is_cut_out_of_its_eight_bit_colours(picture):
    data = encode(picture, "TIFF" if picture.mode == "CMYK" else "PNG")
    expected = cut(Image.fromarray(decode(data, 3, LIMIT)), BOX, SIZE)
    np.testing.assert_array_equal(open_picture(data, 3, LIMIT).part(BOX, SIZE), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_of_a_turned_jpeg_is_measured_in_the_upright_picture(orientation):
    data = turned(noise(), orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture = open_picture(data, 3, LIMIT)
    assert (picture.width, picture.height) == upright.size
    np.testing.assert_array_equal(picture.part(BOX, SIZE), cut(upright, BOX, SIZE))


@pytest.mark.parametrize("size", [(50, 61), (4, 4)])
@pytest.mark.parametrize("exact", [True, False])
def test_of_a_truncated_jpeg_the_size_is_known_and_no_part_is_to_be_had(size, exact):
    data = encode(noise())
    picture = open_picture(data[: len(data) // 2], 3, LIMIT)
    assert (picture.height, picture.width) == (50, 61)
    with pytest.raises(BadImage, match="damaged"):
        picture.part((0, 0, 50, 61), size, exact)


# Measured: means of 100 ImageNet pictures of 42.9, 42.0 and 40.3 dB for scales 2, 4 and 8 at the least reduction, where
# bicubic and Lanczos filters differ by 44.1 to 41.6 dB; the worst of these two photographs 40.1, at 1.4 times it 45.0.
@pytest.mark.parametrize("file", PHOTOGRAPHS, ids=lambda file: file.stem)
@pytest.mark.parametrize("scale, beyond, least", [(2, 1, 39), (2, 1.4, 44), (4, 1, 39), (4, 1.4, 44), (8, 1, 39)])
def test_a_part_that_the_decoder_has_shrunk_is_near_pillows_bicubic_of_the_whole_picture(file, scale, beyond, least):
    data = file.read_bytes()
    whole = Image.open(file).convert("RGB")
    box = 13, 21, 401, 587
    reduction = scale * SPARE * beyond
    size = math.floor(box[2] / reduction), math.floor(box[3] / reduction)
    part = open_picture(data, 3, LIMIT).part(box, size, exact=False)
    assert decibels(part, cut(whole, box, size)) > least


@pytest.mark.parametrize("height, width", [(400, 304), (397, 299)])  # of 397 x 299, a turned one is not shrunk
@pytest.mark.parametrize("orientation", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("scale, size", [(2, (48, 40)), (4, (30, 22)), (8, (13, 12))])
def test_where_the_decoder_shrinks_a_part_it_stays_in_its_place(height, width, orientation, scale, size):
    data = turned(smooth(height, width), orientation, quality=98, subsampling=0)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    top, left, height, width = 51, 33, 211, 243
    part = open_picture(data, 3, LIMIT).part((top, left, height, width), size, exact=False)
    in_place = decibels(part, cut(upright, (top, left, height, width), size))
    half = scale // 2  # of the decoder's pixels
    for moved in ((top + half, left, height, width), (top, left - half, height, width)):
        assert decibels(part, cut(upright, moved, size)) < in_place - 6
    assert in_place > 44


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_the_decoder_shrinks_a_picture_only_where_the_filter_still_has_something_to_reduce(scale, monkeypatch):
    monkeypatch.setattr("mae_jax.data.fast_jpeg.imgproc", None)  # what is not shrunk has Pillow's bits, too
    data = encode(smooth(400, 400))
    for side, factor in ((math.floor(400 / scale / SPARE), scale), (math.floor(400 / scale / SPARE) + 1, scale // 2)):
        reference = Image.open(io.BytesIO(data))
        reference.draft("RGB", (400 // factor, 400 // factor))
        assert reference.size == (400 // factor, 400 // factor)
        expected = reference.resize((side, 20), Image.Resampling.BICUBIC)
        part = open_picture(data, 3, LIMIT).part((0, 0, 400, 400), (20, side), exact=False)
        np.testing.assert_array_equal(part, expected)


def test_a_random_crop_may_be_shrunk_by_the_decoder_and_a_centre_crop_never_is():
    data = PHOTOGRAPHS[0].read_bytes()
    whole = Picture(decode(data, 3, LIMIT))
    crop = functools.partial(random_crop, seed=0, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3))
    shrunk, exact = crop(open_picture(data, 3, LIMIT), 5, (64, 64)), crop(whole, 5, (64, 64))
    assert 38 < decibels(shrunk, exact) < 70
    centre = centre_crop(open_picture(data, 3, LIMIT), 5, (32, 32), eval_crop=0.875)
    np.testing.assert_array_equal(centre, centre_crop(whole, None, (32, 32), eval_crop=0.875))
