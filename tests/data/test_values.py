"""Numbers other than 8-bit grey and RGB travel as they are, or are refused where they would lose something."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.decoding import BadImage
from mae_jax.data.device_batches import read_all
from mae_jax.data.loader import PictureReader, make_train_batches
from mae_jax.data.transforms import centre_crop
from mae_jax.runtime.errors import UserError
from tests.data.conftest import decode, png_16_bit

LIMIT = 10**6
RNG = np.random.default_rng(0)
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # TIFF 6.0, section 19


def tiff(
    values: np.ndarray,
    photometric: int | None = None,
    *,
    order: str = "<",
    extra=(),
    pages: int = 1,
    compressed=False,
    orientation: int = 0,
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
    tags |= {274: [orientation]} if orientation else {}
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


def expected(values: np.ndarray, channels: int) -> np.ndarray:
    """The picture of values [h, w] or [h, w, 3]."""
    return values if values.ndim == 3 else np.repeat(values[..., None], channels, axis=2)


# Values, the bytes of a file of them, and the type of a batch.
DEEP = {
    "12 bits in a 16-bit PNG": (twelve := numbers(3, 4095, np.uint16), png_16_bit(twelve), "uint16"),
    "12 bits in a 16-bit TIFF": (twelve, tiff(twelve), "uint16"),
    "12 bits in a big-endian TIFF": (twelve, tiff(twelve, order=">"), "uint16"),
    "int16 of a CT": (ct := numbers(-1024, 3000, np.int16), tiff(ct), "int16"),
    "int8": (signed := numbers(-120, 99, np.int8), tiff(signed), "int16"),
    "int32": (wide := numbers(-5, 70_000, np.int32), tiff(wide), "float32"),
    "uint32": (large := numbers(7, 2**24, np.uint32), tiff(large), "float32"),
    "floats": (floats := numbers(-0.5, 700, np.float32), tiff(floats, order=">"), "float32"),
    "compressed floats": (floats, tiff(floats, order=">", compressed=True), "float32"),
    "64-bit floats": (double := numbers(0, 0.5, np.float64), tiff(double), "float32"),
    "RGB of floats": (colours := numbers(0, 1, np.float32, 3), tiff(colours), "float32"),
    "16-bit RGB in a PNG": (rgb := numbers(0, 4095, np.uint16, 3), png_16_bit(rgb), "uint16"),
    "16-bit RGB in a TIFF": (rgb, tiff(rgb), "uint16"),
    "16-bit RGB in a big-endian TIFF": (rgb, tiff(rgb, order=">"), "uint16"),
}


@pytest.mark.parametrize("name", DEEP)
def test_numbers_of_every_kind_travel_as_they_are_in_the_smallest_type_that_keeps_them(name):
    values, data, dtype = DEEP[name]
    found = decode(data, 3, LIMIT)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected(values, 3).astype(dtype))
    np.testing.assert_array_equal(decode(data, 3, LIMIT, "float32"), expected(values, 3).astype(np.float32))


@pytest.mark.parametrize("found, wanted, remedy", [
    ("uint16", "uint8", "uint16"), ("int16", "uint16", "float32"), ("uint16", "int16", "float32"),
    ("float32", "float16", "float32"), ("int16", "float16", "float32"), ("float32", "uint8", "float32"),
    ("int8", "uint8", "int16"), ("float16", "int16", "float32"),
])  # fmt: skip
def test_a_picture_that_a_type_does_not_hold_is_refused_with_one_that_holds_both(found, wanted, remedy):
    stream = io.BytesIO()
    np.save(stream, np.zeros((4, 5), found))
    with pytest.raises(BadImage, match=f"{found} among {wanted} pictures: set data.dtype={remedy}( and|$)"):
        decode(stream.getvalue(), 1, LIMIT, wanted)


@pytest.mark.parametrize("wanted", ["uint16", "int16", "float16", "float32"])
def test_8_bit_files_and_arrays_keep_their_values_in_larger_types(wanted):
    grey, stream = RNG.integers(0, 256, (16, 16), np.uint8), io.BytesIO()
    Image.fromarray(grey).save(stream, "PNG")
    for data in (stream.getvalue(), grey):
        found = decode(data, 3, LIMIT, wanted)
        assert found.dtype == wanted
        np.testing.assert_array_equal(found, expected(grey, 3))


@pytest.mark.parametrize("values, highest", [
    (numbers(0, 255, np.uint8), 255), (numbers(0, 4095, np.uint16), 65535), (numbers(0, 9, np.uint32), 2**32 - 1),
])  # fmt: skip
def test_where_0_is_white_it_comes_out_white(values, highest):
    image = decode(tiff(values, photometric=0), 1, LIMIT)
    np.testing.assert_array_equal(image[..., 0], (highest - values.astype(np.int64)).astype(image.dtype))


def test_floats_of_which_0_is_white_do_not_say_what_is_black():
    with pytest.raises(BadImage, match="float32 values of which 0 is white, but which is black"):
        decode(tiff(numbers(0, 1, np.float32), photometric=0), 1, LIMIT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_heeded_in_16_bit_colours(orientation):
    values, exif = numbers(0, 4095, np.uint16, 3), Image.Exif()
    first = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[orientation]  # EXIF 2.3, 4.6.4 A
    stored = values[::-1] if "b" in first else values  # its row 0 and column 0 are these sides of the picture
    stored = stored[:, ::-1] if "r" in first else stored
    stored = stored.swapaxes(0, 1) if first[0] in "lr" else stored
    exif[0x0112] = orientation
    block, png = exif.tobytes().removeprefix(b"Exif\0\0"), png_16_bit(stored)
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block
    png = png[:33] + chunk + struct.pack(">I", zlib.crc32(b"eXIf" + block)) + png[33:]
    for data in (png, tiff(stored, orientation=orientation)):
        np.testing.assert_array_equal(decode(data, 3, LIMIT), values)


def test_infinite_values_are_bad_and_nan_is_kept():
    with pytest.raises(BadImage, match="infinite values"):
        decode(tiff(np.asarray([[0, np.inf]], np.float32)), 3, LIMIT)
    found = decode(tiff(np.asarray([[0, np.nan]], np.float32)), 3, LIMIT)
    np.testing.assert_array_equal(found[0], [[0] * 3, [np.nan] * 3])


def test_deep_grey_is_the_luminance_of_deep_colours():
    for values in (numbers(0, 4095, np.uint16, 3), numbers(-2, 1, np.float32, 3)):
        luma = values.astype(float) @ [0.299, 0.587, 0.114]  # ITU-R 601
        grey = decode(values, 1, LIMIT)[..., 0]
        np.testing.assert_allclose(grey, luma, atol=0.5 if values.dtype == np.uint16 else 1e-5)


# Files, and the number of their channels.
BANDS = {
    "RGB and near infrared, not marked": (tiff(numbers(0, 255, np.uint8, 4)), 4),
    "RGB and an unspecified band": (tiff(numbers(0, 255, np.uint8, 4), extra=[0]), 4),
    "16-bit RGB and an unspecified band": (tiff(numbers(0, 99, np.uint16, 4), extra=[0]), 4),
    "RGB, alpha and another": (tiff(numbers(0, 255, np.uint8, 5), extra=[2, 0]), 5),
    "grey and another": (tiff(numbers(0, 255, np.uint8, 2), 1, extra=[0]), 2),
    "five bands": (tiff(numbers(0, 255, np.uint8, 5), 1, extra=[0] * 4), 5),
    "16-bit RGB with transparency": (png_16_bit(numbers(0, 99, np.uint16, 4)), 4),
    "16-bit grey with transparency": (png_16_bit(numbers(0, 99, np.uint16, 2)), 2),
}


@pytest.mark.parametrize("name", BANDS)
def test_no_band_is_lost_or_blended_unless_bands_are_chosen(name):
    data, count = BANDS[name]
    with pytest.raises(BadImage, match=f"has {count} channels, but model.channels=3: .*data.bands"):
        decode(data, 3, LIMIT)
    whole = decode(data, count, LIMIT)
    assert whole.shape == (6, 9, count)
    np.testing.assert_array_equal(decode(data, 2, LIMIT, None, (1, 0)), whole[..., [1, 0]])
    with pytest.raises(BadImage, match=f"{count} channels, too few for data.bands=\\(0, {count}\\)"):
        decode(data, 2, LIMIT, None, (0, count))


def test_pages_of_a_tiff_are_channels_only_where_there_are_as_many_or_bands_are_chosen():
    values = numbers(0, 255, np.uint8)
    np.testing.assert_array_equal(decode(tiff(values, pages=4), 4, LIMIT), expected(values, 4))
    data = tiff(values, pages=3)
    np.testing.assert_array_equal(decode(data, 3, LIMIT, None, (0, 1, 2)), expected(values, 3))
    np.testing.assert_array_equal(decode(data, 1, LIMIT, None, (2,))[..., 0], values)
    for channels in (1, 3, 5):  # three pages are not red, green and blue unless someone says so
        with pytest.raises(BadImage, match="a file of 3 pages: save each as a file, or .* data.bands"):
            decode(data, channels, LIMIT)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "P"])
def test_chosen_bands_of_an_8_bit_picture_are_its_own_and_transparency_is_one_of_them(mode):
    pixels = Image.fromarray(numbers(0, 255, np.uint8, 4), "RGBA").convert(mode)
    stream = io.BytesIO()
    pixels.save(stream, "PNG")
    own = np.asarray(pixels.convert("RGB") if mode == "P" else pixels)
    last = own.shape[2] - 1
    np.testing.assert_array_equal(decode(stream.getvalue(), 2, LIMIT, None, (last, 0)), own[..., [last, 0]])
    if last == 3:
        np.testing.assert_array_equal(decode(stream.getvalue(), 4, LIMIT), own)


@pytest.mark.parametrize("header, channels", [(b"P5 9 6 4095\n", 1), (b"P6 9 6 65535\n", 3)])
def test_netpbms_of_more_than_8_bits_are_told_apart_from_those_of_8(header, channels):
    values = numbers(0, 255, np.uint8, 3 if channels == 3 else 0)
    deep, plain = header + values.astype(">u2").tobytes(), header.replace(b"4095", b"255").replace(b"65535", b"255")
    with pytest.raises(BadImage, match="a PPM of 1[26]-bit numbers: save it as"):
        decode(deep, channels, LIMIT)
    assert decode(plain + values.tobytes(), channels, LIMIT).dtype == np.uint8


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


def test_a_data_set_of_another_type_ends_in_one_line_that_names_one_picture_and_the_setting(make_config):
    batches = make_train_batches(Files([tiff(twelve)] * 40), make_config(batch_size=4), (8, 8), 3)
    with pytest.raises(UserError, match=r"\d+.tif and the 20 .*: uint16 among uint8 pictures: set data.dtype=uint16"):
        next(batches)


def test_training_and_evaluation_have_the_same_values_in_batches_of_their_type(make_config):
    source, config = Files([tiff(twelve)] * 8), make_config(batch_size=4, dtype="uint16")
    whole = expected(twelve, 3)
    np.testing.assert_array_equal(read_all(source, config, 3)[0]["image"][5], whole)
    reader = PictureReader(source, config, 3)
    image, _ = reader.read(0, lambda picture: centre_crop(picture, None, (6, 9), eval_crop=1.0))
    np.testing.assert_array_equal(image, whole)
    config.update(crop_scale=(1, 1), crop_ratio=(1.5, 1.5), flip=False)
    batches = make_train_batches(source, config, (6, 9), 3)
    images = next(batches)["image"]
    batches.close()
    assert images.dtype == np.uint16
    np.testing.assert_array_equal(images[0], whole)
