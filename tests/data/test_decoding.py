"""Pictures of every colour mode and orientation become the pixels a viewer would show; bad ones are refused."""

import io

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.decoding import BadImage
from mae_jax.runtime.errors import UserError
from tests.data.conftest import decode

LIMIT = 10**6


def encode(picture: Image.Image, file_format: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, file_format, **options)
    return stream.getvalue()


def from_pixels(rows, mode="RGB", dtype=np.uint8) -> Image.Image:
    values = np.asarray(rows, dtype)
    picture = Image.new(mode, (values.shape[1], values.shape[0]))
    picture.putdata([tuple(v) if values.ndim == 3 else v.item() for v in values.reshape(-1, *values.shape[2:])])
    return picture


def test_rgb_is_kept_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for file_format in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode(encode(Image.fromarray(pixels), file_format), 3, LIMIT), pixels)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(pixels), "WEBP", lossless=True), 3, LIMIT), pixels)


@pytest.mark.parametrize("mode, pixel, rgb", [
    ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)),
    ("1", 0, (0, 0, 0)),
    ("LA", (100, 255), (100, 100, 100)),
    ("LA", (100, 0), (255, 255, 255)),
    ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ("RGBA", (0, 100, 200, 51), (204, 224, 244)),  # 0.2 of the colour and 0.8 of white
])  # fmt: skip
def test_every_png_mode_becomes_rgb_over_white(mode, pixel, rgb):
    image = decode(encode(Image.new(mode, (3, 2), pixel)), 3, LIMIT)
    assert image.shape == (2, 3, 3) and image.dtype == np.uint8
    np.testing.assert_allclose(image[0, 0].astype(int), rgb, atol=1)


def palette_picture() -> Image.Image:
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putdata([0, 1])
    return picture


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP"])
def test_a_palette_is_looked_up(file_format):
    image = decode(encode(palette_picture(), file_format), 3, LIMIT)
    np.testing.assert_array_equal(image, [[(10, 20, 30), (40, 50, 60)]])


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(file_format):
    image = decode(encode(palette_picture(), file_format, transparency=0), 3, LIMIT)
    np.testing.assert_array_equal(image, [[(255, 255, 255), (40, 50, 60)]])


def test_the_transparent_colour_of_an_rgb_or_grey_png_is_white():
    rgb = encode(from_pixels([[(1, 2, 3), (4, 5, 6)]]), transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode(rgb, 3, LIMIT), [[(255, 255, 255), (4, 5, 6)]])
    grey = encode(from_pixels([[9, 8]], "L"), transparency=9)
    np.testing.assert_array_equal(decode(grey, 1, LIMIT), [[[255], [8]]])


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
@pytest.mark.parametrize("cmyk, rgb", [
    ((0, 0, 0, 0), (255, 255, 255)),
    ((255, 0, 0, 0), (0, 255, 255)),
    ((0, 255, 255, 0), (255, 0, 0)),
    ((0, 0, 0, 255), (0, 0, 0)),
])  # fmt: skip
def test_cmyk_is_ink_also_where_adobe_stores_it_inverted(file_format, cmyk, rgb):
    data = encode(Image.new("CMYK", (8, 8), cmyk), file_format)
    if file_format == "JPEG":
        assert b"Adobe" in data  # the marker that says that the values are inverted
    np.testing.assert_allclose(decode(data, 3, LIMIT)[4, 4].astype(int), rgb, atol=3)


def test_ycbcr_and_lab_tiffs_become_rgb():
    # Y'CbCr of JFIF: R = Y + 1.402 (Cr - 128), G = Y - 0.344 (Cb - 128) - 0.714 (Cr - 128), B = Y + 1.772 (Cb - 128)
    image = decode(encode(Image.new("YCbCr", (4, 4), (100, 110, 150)), "TIFF"), 3, LIMIT)
    np.testing.assert_allclose(image[0, 0].astype(int), (131, 90, 68), atol=2)
    # CIE L*a*b*: L* 100 is white, L* 53.6 is the grey that sRGB writes as 128.
    lab = from_pixels([[(255, 128, 128), (137, 128, 128)]], "LAB")
    image = decode(encode(lab, "TIFF"), 3, LIMIT)
    np.testing.assert_allclose(image[0].astype(int), [(255, 255, 255), (128, 128, 128)], atol=3)


def test_one_channel_is_the_luminance():
    # ITU-R 601: 0.299 R + 0.587 G + 0.114 B
    pixels = np.asarray([[(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]], np.uint8)
    for data in (encode(Image.fromarray(pixels)), pixels):
        np.testing.assert_array_equal(decode(data, 1, LIMIT)[..., 0], [[76, 150, 29, 255]])


UPRIGHT = np.asarray([[1, 2, 3], [4, 5, 6]], np.uint8) * 40


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation, stored", [
    # EXIF 2.3, 4.6.4 A: where the 0th row and the 0th column of the stored picture are in the visual picture
    (1, [[1, 2, 3], [4, 5, 6]]),  # top, left
    (2, [[3, 2, 1], [6, 5, 4]]),  # top, right
    (3, [[6, 5, 4], [3, 2, 1]]),  # bottom, right
    (4, [[4, 5, 6], [1, 2, 3]]),  # bottom, left
    (5, [[1, 4], [2, 5], [3, 6]]),  # left, top
    (6, [[3, 6], [2, 5], [1, 4]]),  # right, top
    (7, [[6, 3], [5, 2], [4, 1]]),  # right, bottom
    (8, [[4, 1], [5, 2], [6, 3]]),  # left, bottom
])  # fmt: skip
def test_every_exif_orientation_is_turned_upright(file_format, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if file_format == "WEBP" else {}
    picture = Image.fromarray(np.asarray(stored, np.uint8) * 40).convert("RGB")
    data = encode(picture, file_format, exif=exif, **options)
    np.testing.assert_array_equal(decode(data, 1, LIMIT)[..., 0], UPRIGHT)


def test_a_jpeg_with_an_exif_orientation_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    stored = np.zeros((16, 32), np.uint8)
    stored[:, :16] = 255  # white on the left, so on top when upright
    image = decode(encode(Image.fromarray(stored), "JPEG", exif=exif), 1, LIMIT)[..., 0]
    assert image.shape == (32, 16)
    assert image[:14].min() > 240 and image[18:].max() < 15


def test_a_damaged_exif_block_does_not_spoil_the_picture():
    data = encode(Image.new("L", (8, 8), 200), "JPEG", exif=b"Exif\0\0" + b"\xff" * 20)
    assert abs(int(decode(data, 1, LIMIT)[0, 0, 0]) - 200) < 3


@pytest.mark.parametrize("file_format, options", [("GIF", {}), ("WEBP", {"lossless": True})])
def test_the_first_frame_of_an_animation_is_taken(file_format, options):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(data, 3, LIMIT)[0, 0], (255, 0, 0))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_picture_is_bad(file_format, share):
    data = encode(NOISE, file_format)
    with pytest.raises(BadImage):
        decode(data[: int(share * len(data))], 3, LIMIT)


@pytest.mark.parametrize("data", [
    b"", b"\0", b"GIF89a", b"<html>not found</html>", b"\xff\xd8\xff\xe0" + b"\0" * 100,
    b"II*\0", b"MM\0*\0\0\0\x08\0\x05", b"II+\0" + b"\xff" * 20,
])  # fmt: skip
def test_what_is_no_picture_is_bad(data):
    with pytest.raises(BadImage):
        decode(data, 3, LIMIT)


def test_a_picture_above_the_limit_is_refused_by_its_header_alone():
    data = encode(Image.new("L", (101, 100)))
    assert decode(data, 3, 10_100).shape == (100, 101, 3)
    with pytest.raises(BadImage, match="101 x 100 pixels are more than data.max_pixels=10099"):
        decode(data[:64], 3, 10_099)  # the pixels are not even there


def test_what_pillow_takes_for_a_decompression_bomb_is_refused_whatever_the_limit():
    data = encode(Image.new("1", (13_500, 13_300)))  # above twice the limit at which Pillow warns
    with pytest.raises(BadImage, match="absurdly large"):
        decode(data, 1, 10**12)


@pytest.mark.parametrize("shape, channels, expected", [
    ((4, 5), 1, (4, 5, 1)), ((4, 5), 3, (4, 5, 3)), ((4, 5, 1), 3, (4, 5, 3)), ((4, 5, 13), 13, (4, 5, 13)),
])  # fmt: skip
def test_arrays_are_taken_as_they_are_and_grey_is_repeated(shape, channels, expected):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = decode(array, channels, LIMIT)
    assert image.shape == expected
    np.testing.assert_array_equal(image, np.broadcast_to(array.reshape(4, 5, -1), expected))


def test_a_wrong_number_of_channels_is_the_users_mistake():
    with pytest.raises(UserError, match="13 channels, but model.channels=3: change that"):
        decode(np.zeros((4, 4, 13), np.uint8), 3, LIMIT)
    with pytest.raises(UserError, match="8 channels.*channels are first"):
        decode(np.zeros((3, 9, 8), np.uint8), 3, LIMIT)
    with pytest.raises(UserError, match="float32 among uint8 pictures"):
        decode(np.zeros((4, 4, 3), np.float32), 3, LIMIT, "uint8")
