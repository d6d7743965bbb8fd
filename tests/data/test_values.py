"""Numbers other than 8-bit grey and RGB: refused where nothing says their range, scaled alike by data.value_range."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.decoding import BadImage, deep_type, open_picture
from mae_jax.data.device_batches import read_all
from mae_jax.data.loader import PictureReader, make_train_batches
from mae_jax.data.transforms import centre_crop
from mae_jax.runtime.errors import UserError
from tests.data.conftest import decode, png_16_bit

LIMIT = 10**6
RNG = np.random.default_rng(0)
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # TIFF 6.0, section 19


def tiff(
    values: np.ndarray, photometric: int | None = None, *, order: str = "<", extra=(), pages: int = 1, compressed=False
) -> bytes:
    """A TIFF of [h, w] or [h, w, c], written byte by byte, tag by tag (TIFF 6.0, section 2)."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, samples = values.shape
    kind = {"u": UNSIGNED, "i": SIGNED, "f": FLOAT}[values.dtype.kind]
    photometric = (2 if samples >= 3 else 1) if photometric is None else photometric
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    pixels = zlib.compress(pixels) if compressed else pixels
    tags = {256: [width], 257: [height], 258: [8 * values.itemsize] * samples, 259: [8 if compressed else 1],
            262: [photometric], 273: [8], 277: [samples], 278: [height], 279: [len(pixels)],
            339: [kind] * samples}  # fmt: skip
    tags |= {338: list(extra)} if extra else {}
    file = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(pixels)) + pixels
    for page in range(pages):
        behind = len(file) + 2 + 12 * len(tags) + 4
        directory, beyond = struct.pack(order + "H", len(tags)), b""
        for tag, numbers in sorted(tags.items()):
            body = struct.pack(f"{order}{len(numbers)}I", *numbers)
            if len(body) > 4:
                body, beyond = struct.pack(order + "I", behind + len(beyond)), beyond + body
            directory += struct.pack(order + "HHI", tag, 4, len(numbers)) + body
        last = page == pages - 1
        file += directory + struct.pack(order + "I", 0 if last else behind + len(beyond)) + beyond
    return file


def numbers(low: float, high: float, dtype, channels: int = 0) -> np.ndarray:
    values = RNG.uniform(low, high, (6, 9, channels) if channels else (6, 9)).astype(dtype)
    values[0, 0], values[0, 1] = low, high
    return values


def expected(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = np.round(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
    return scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)


# What is in the file, its bytes, and what the message calls it.
DEEP = {
    "12 bits in a 16-bit PNG": (twelve := numbers(3, 4095, np.uint16), png_16_bit(twelve), "16-bit grey", "3 to 4095"),
    "12 bits in a 16-bit TIFF": (twelve, tiff(twelve), "16-bit grey", "3 to 4095"),
    "12 bits in a big-endian TIFF": (twelve, tiff(twelve, order=">"), "16-bit grey", "3 to 4095"),
    "int16 of a CT": (
        ct := numbers(-1024, 3000, np.int16), tiff(ct), "signed 16-bit grey", "-1024 to 3000",
    ),
    "int8": (signed := numbers(-120, 99, np.int8), tiff(signed), "signed 8-bit grey", "-120 to 99"),
    "int32": (wide := numbers(-5, 70_000, np.int32), tiff(wide), "signed 32-bit grey", "-5 to 70000"),
    "uint32": (large := numbers(7, 4e9, np.uint32), tiff(large), "32-bit grey", "7 to 4e"),
    "floats": (
        floats := numbers(-0.5, 700, np.float32), tiff(floats, order=">"), "32-bit float grey", "-0.5 to 700",
    ),
    "floats on 0..1": (unit := numbers(0, 1, np.float32), tiff(unit), "32-bit float grey", "0 to 1"),
    "16-bit RGB in a PNG": (rgb := numbers(0, 4095, np.uint16, 3), png_16_bit(rgb), "16-bit RGB", "0 to 4095"),
    "16-bit RGB in a TIFF": (rgb, tiff(rgb), "16-bit RGB", "0 to 4095"),
    "16-bit RGB in a big-endian TIFF": (rgb, tiff(rgb, order=">"), "16-bit RGB", "0 to 4095"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEEP)
def test_numbers_of_no_known_range_are_refused_by_their_type_and_values_with_the_setting_that_takes_them(name):
    _, data, kind, values = DEEP[name]
    with pytest.raises(BadImage, match=f"^{kind} with values from {values}.*set data.value_range=.low, high."):
        decode(data, 3, LIMIT)


@pytest.mark.parametrize("name", DEEP)
def test_a_value_range_scales_numbers_of_every_kind_exactly_and_clips_them(name):
    values, data, *_ = DEEP[name]
    least, most = float(values.min()), float(values.max())
    for low, high in ((least, most), (least + (most - least) / 4, most - (most - least) / 4)):
        np.testing.assert_array_equal(decode(data, 3, LIMIT, (low, high)), expected(values, low, high))


def test_the_scale_does_not_depend_on_the_values_of_one_picture():
    bright, dark = np.full((4, 4), 4000, np.uint16), np.full((4, 4), 40, np.uint16)
    seen = [int(decode(tiff(values), 1, LIMIT, (0, 4095)).max()) for values in (bright, dark)]
    assert seen == [round(4000 * 255 / 4095), round(40 * 255 / 4095)]


def test_the_whole_range_of_16_bits_is_divided_by_257():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    np.testing.assert_array_equal(decode(tiff(values), 1, LIMIT, (0, 65535))[..., 0], np.round(values / 257))


def test_a_value_range_scales_8_bit_files_jpegs_and_arrays_too():
    grey = RNG.integers(0, 256, (16, 16), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(grey).save(stream, "JPEG")
    plain = decode(stream.getvalue(), 3, LIMIT)
    np.testing.assert_array_equal(decode(stream.getvalue(), 3, LIMIT, (50, 180)), expected(plain, 50, 180))
    np.testing.assert_array_equal(decode(grey, 3, LIMIT, (50, 180)), expected(grey, 50, 180))
    np.testing.assert_array_equal(decode(grey, 3, LIMIT, (0, 255)), decode(grey, 3, LIMIT))
    part = open_picture(stream.getvalue(), 3, LIMIT, (50, 180)).part((0, 0, 16, 16), (16, 16))
    np.testing.assert_array_equal(part, expected(plain, 50, 180))


@pytest.mark.parametrize("values, value_range", [
    (numbers(0, 255, np.uint8), None), (numbers(0, 4095, np.uint16), (0, 4095)), (numbers(0, 1, np.float32), (0, 1)),
])  # fmt: skip
def test_where_0_is_white_it_comes_out_white(values, value_range):
    low, high = value_range or (0, 255)
    image = decode(tiff(values, photometric=0), 3, LIMIT, value_range)
    np.testing.assert_array_equal(image, 255 - expected(values, low, high))


def test_an_orientation_is_heeded_in_16_bit_colours():
    values = numbers(0, 4095, np.uint16, 3)
    stored, exif = values[::-1, ::-1], Image.Exif()
    exif[0x0112] = 3  # upside down
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    png = png_16_bit(stored)
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block
    png = png[:33] + chunk + struct.pack(">I", zlib.crc32(b"eXIf" + block)) + png[33:]
    np.testing.assert_array_equal(decode(png, 3, LIMIT, (0, 4095)), expected(values, 0, 4095))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_that_are_not_finite_are_bad(value):
    with pytest.raises(BadImage, match="32-bit float grey with values that are not finite"):
        decode(tiff(np.asarray([[0, value]], np.float32)), 3, LIMIT, (0, 1))


BANDS = {
    "RGB and near infrared, not marked": (tiff(numbers(0, 255, np.uint8, 4)), "4 x 8-bit .* 1 beyond its colours"),
    "RGB and an unspecified band": (tiff(numbers(0, 255, np.uint8, 4), extra=[0]), "1 beyond its colours"),
    "16-bit RGB and an unspecified band": (tiff(numbers(0, 99, np.uint16, 4), extra=[0]), "1 beyond its colours"),
    "RGB, alpha and another": (tiff(numbers(0, 255, np.uint8, 5), extra=[2, 0]), "2 beyond its colours"),
    "grey and another": (tiff(numbers(0, 255, np.uint8, 2), 1, extra=[0]), "1 beyond its colours"),
    "five bands": (tiff(numbers(0, 255, np.uint8, 5), 1, extra=[0] * 4), "of a kind which is not read"),
    "16-bit RGB with transparency": (
        png_16_bit(numbers(0, 99, np.uint16, 4)),
        "a PNG of 16-bit RGBA, which is not read",
    ),
    "16-bit grey with transparency": (
        png_16_bit(numbers(0, 99, np.uint16, 2)),
        "a PNG of 16-bit LA, which is not read",
    ),
    "64-bit floats": (tiff(numbers(0, 1, np.float64)), "of a kind which is not read"),
    "RGB of floats": (tiff(numbers(0, 1, np.float32, 3)), "of a kind which is not read"),
    "three pages": (tiff(numbers(0, 255, np.uint8), pages=3), "a TIFF of 3 pages: save each as a file"),
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("value_range", [None, (0, 100)])
def test_what_would_lose_or_blend_a_band_or_a_page_is_refused_whatever_the_range(name, value_range):
    data, message = BANDS[name]
    with pytest.raises(BadImage, match=message):
        decode(data, 3, LIMIT, value_range)


def test_floats_whose_bytes_pillow_swaps_twice_are_refused():
    values = numbers(0, 1, np.float32)
    with pytest.raises(BadImage, match="TIFF of 1 x 32-bit float numbers a pixel, which is not read"):
        decode(tiff(values, order=">", compressed=True), 3, LIMIT, (0, 1))
    np.testing.assert_array_equal(decode(tiff(values, compressed=True), 3, LIMIT, (0, 1)), expected(values, 0, 1))


@pytest.mark.parametrize("header, channels", [(b"P5 9 6 4095\n", 1), (b"P6 9 6 65535\n", 3)])
def test_netpbms_of_more_than_8_bits_are_told_apart_from_those_of_8(header, channels):
    values = numbers(0, 255, np.uint8, 3 if channels == 3 else 0)
    deep, plain = header + values.astype(">u2").tobytes(), header.replace(b"4095", b"255").replace(b"65535", b"255")
    with pytest.raises(BadImage, match="a PPM of 1[26]-bit (L|RGB), which is not read"):
        deep_type(Image.open(io.BytesIO(deep)))
    assert deep_type(Image.open(io.BytesIO(plain + values.tobytes()))) is None


@pytest.mark.parametrize("data", [b"P1\n2 1\n0 1\n", b"P4\n2 1\n\x40", b"P2\n2 1\n9\n9 0\n", b"P5\n2 1\n9\n\x09\0"])
def test_netpbms_of_8_bits_or_fewer_are_read(data):
    np.testing.assert_array_equal(decode(data, 1, LIMIT)[..., 0], [[255, 0]])


@pytest.mark.parametrize("alpha", [1, 2])
def test_a_band_that_is_marked_as_transparency_is_laid_over_white(alpha):
    values = np.zeros((4, 4, 4), np.uint8)  # black, and wholly transparent
    np.testing.assert_array_equal(decode(tiff(values, extra=[alpha]), 3, LIMIT), np.full((4, 4, 3), 255))


class Files:
    """A source of encoded pictures."""

    num_classes, class_names, in_memory, picture_size = 0, None, False, (6, 9)

    def __init__(self, files: list[bytes]):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return {"image": self.files[index], "label": -1}

    def name_of(self, index):
        return f"{index}.tif"


def test_a_data_set_of_such_files_ends_in_one_line_that_names_one_of_them_and_the_setting(make_config):
    batches = make_train_batches(Files([tiff(twelve)] * 40), make_config(batch_size=4), (8, 8), 3)
    with pytest.raises(UserError, match=r"\d+.tif and the 20 .*: 16-bit grey with values from 3 to 4095.*value_range"):
        next(batches)


def test_training_resident_pictures_and_evaluation_are_scaled_alike(make_config):
    source, config = Files([tiff(twelve)] * 8), make_config(batch_size=4, value_range=(0, 4095))
    whole = expected(twelve, 0, 4095)
    np.testing.assert_array_equal(read_all(source, config, 3)[0]["image"][5], whole)
    reader = PictureReader(source, config, 3)
    image, _ = reader.read(0, lambda picture: centre_crop(picture, None, (6, 9), eval_crop=1.0))
    np.testing.assert_array_equal(image, whole)
    config.update(crop_scale=(1, 1), crop_ratio=(1.5, 1.5), flip=False)
    batches = make_train_batches(source, config, (6, 9), 3)
    np.testing.assert_array_equal(next(batches)["image"][0], whole)
    batches.close()
