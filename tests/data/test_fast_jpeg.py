"""Random crops of JPEGs by simplejpeg and kornia-rs: near Pillow's, or Pillow's where these cannot read a picture."""

import functools
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mae_jax.data import fast_jpeg
from mae_jax.data.decoding import BadImage, open_picture
from mae_jax.data.fast_jpeg import plain_jpeg_size
from mae_jax.data.transforms import LARGEST_SIDE, random_crop
from tests.data.test_parts import LIMIT, PHOTOGRAPHS, cut, decibels, encode, noise, smooth, turned

needs_packages = pytest.mark.skipif(fast_jpeg.imgproc is None, reason="simplejpeg and kornia-rs are not installed")
BOX, SIZE = (13, 21, 130, 140), (96, 112)
WHOLE = (0, 0, 150, 170)


def pillows(data: bytes, box=BOX, size=SIZE, mode: str = "RGB") -> np.ndarray:
    return cut(Image.open(io.BytesIO(data)).convert(mode), box, size)


@needs_packages
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [
    {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"subsampling": "4:2:0"}, {"progressive": True},
    {"keep_rgb": True}, {"restart_marker_rows": 1},
], ids=str)  # fmt: skip
def test_a_box_that_keeps_its_size_has_the_bits_of_pillows_decoder(mode, options):
    data = encode(noise(150, 170).convert(mode), quality=90, **options)
    part = fast_jpeg.cut_jpeg(data, BOX, BOX[2:])
    np.testing.assert_array_equal(part, pillows(data, BOX, BOX[2:]))
    np.testing.assert_array_equal(open_picture(data, 3, LIMIT).part(BOX, BOX[2:], exact=False), part)


# Measured: 66 to 74 dB on these two photographs, and 62 dB, at the least 53, on 247 pictures of ImageNet.
@needs_packages
@pytest.mark.parametrize("file", PHOTOGRAPHS, ids=lambda file: file.stem)
@pytest.mark.parametrize("box", [(40, 60, 380, 500), (40, 60, 200, 300), (0, 0, 90, 427)])
def test_a_random_crop_is_near_pillows_bicubic(file, box):
    data, size = file.read_bytes(), (224, 224)
    part = open_picture(data, 3, LIMIT).part(box, size, exact=False)
    assert 60 < decibels(part, pillows(data, box, size))
    assert part.shape == (224, 224, 3) and part.dtype == np.uint8


def test_an_exact_part_has_pillows_bits():
    data = PHOTOGRAPHS[0].read_bytes()
    np.testing.assert_array_equal(open_picture(data, 3, LIMIT).part(BOX, SIZE), pillows(data))


def exotic(name: str) -> bytes:
    picture = smooth(150, 170)
    if name == "turned":
        return turned(picture, 3)
    if name == "small":
        return encode(picture.resize((LARGEST_SIDE, LARGEST_SIDE)))
    return encode(picture, "PNG") if name == "PNG" else encode(picture.convert(name))


@pytest.mark.parametrize("name", ["CMYK", "turned", "small", "PNG"])
def test_what_is_no_upright_jpeg_of_one_or_three_colours_or_may_live_on_a_device_is_read_by_pillow(name, monkeypatch):
    data, box = exotic(name), (3, 5, 100, 90)
    expected = open_picture(data, 3, LIMIT).part(box, SIZE)
    monkeypatch.setattr("mae_jax.data.decoding.cut_jpeg", None)
    np.testing.assert_array_equal(open_picture(data, 3, LIMIT).part(box, SIZE, exact=False), expected)


def test_grey_models_are_for_pillow(monkeypatch):
    monkeypatch.setattr("mae_jax.data.decoding.cut_jpeg", None)
    data = encode(smooth(150, 170))
    grey = open_picture(data, 1, LIMIT).part(BOX, SIZE, exact=False)
    np.testing.assert_array_equal(grey[..., 0], pillows(data, mode="L"))


def test_without_the_packages_pillow_reads_everything(monkeypatch):
    monkeypatch.setattr(fast_jpeg, "imgproc", None)
    data = encode(smooth(150, 170))
    np.testing.assert_array_equal(open_picture(data, 3, LIMIT).part(BOX, SIZE, exact=False), pillows(data))


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_of_a_truncated_jpeg_no_crop_is_to_be_had(share):
    data = encode(noise(150, 170))
    with pytest.raises(BadImage, match="damaged: .*truncated"):
        open_picture(data[: int(share * len(data))], 3, LIMIT).part(WHOLE, SIZE, exact=False)


def test_a_jpeg_with_a_flaw_that_pillow_forgives_gives_pillows_pixels():
    data = bytearray(encode(noise(150, 170)))
    data[-2:-2] = b"\1\2\3" * 5  # behind the last pixel
    np.testing.assert_array_equal(open_picture(bytes(data), 3, LIMIT).part(BOX, SIZE, False), pillows(bytes(data)))


@needs_packages
def test_crops_are_the_same_with_any_number_of_threads_of_kornia():
    program = (
        "import hashlib, numpy; from kornia_rs import imgproc\n"
        "for shape in (700, 500, 3), (150, 901, 3):\n"
        "    image = numpy.random.default_rng(0).integers(0, 256, shape, numpy.uint8)\n"
        "    print(hashlib.sha256(imgproc.resize(image, (224, 224), 'bicubic', True).tobytes()).hexdigest())"
    )
    run = functools.partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, check=True)
    seen = [run(env=os.environ | {"RAYON_NUM_THREADS": str(threads)}).stdout for threads in (1, 7)]
    assert seen[0] == seen[1] and len(seen[0].split()) == 2


def test_crops_are_the_same_in_many_threads_at_once():
    data = [file.read_bytes() for file in PHOTOGRAPHS]
    crop = functools.partial(random_crop, seed=0, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3))

    def take(place: int) -> np.ndarray:
        return crop(open_picture(data[place % 2], 3, LIMIT), place, (96, 96))

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(take, range(24)))
    np.testing.assert_array_equal(together, [take(place) for place in range(24)])


def jpeg_of(mode="RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (150, 140), "olive").convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": "4:2:0"}])
def test_the_header_of_a_plain_jpeg_tells_its_size(mode, options):
    assert plain_jpeg_size(jpeg_of(mode, **options)) == (140, 150)


def test_what_needs_pillow_or_is_cut_short_has_no_plain_header():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, png = jpeg_of(), b"\x89PNG\r\n\x1a\n" + bytes(99)
    scan = plain.index(b"\xff\xda")
    for data in (jpeg_of(exif=exif.tobytes()), jpeg_of("CMYK"), png, *(plain[:size] for size in range(scan + 2))):
        assert plain_jpeg_size(data) is None
    for size in range(scan + 2, scan + 9):
        with pytest.raises(BadImage):
            open_picture(plain[:size], 3, 10**6).whole()
