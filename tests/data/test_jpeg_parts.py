"""Parts of JPEGs are decoded alone, to the bits of the whole picture."""

import io

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.jpeg_parts import part_of, read_header

simplejpeg = pytest.importorskip("simplejpeg")


def jpeg(mode="RGB", size=(77, 100), seed=0, **options) -> bytes:
    small = np.random.default_rng(seed).integers(0, 256, (size[0] // 5, size[1] // 5, 3), np.uint8)
    picture = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).convert(mode)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", ["4:2:0", "4:2:2", "4:4:4"])
def test_every_box_has_the_bits_of_the_whole_picture(mode, subsampling):
    data, rng = jpeg(mode, subsampling=subsampling, restart_marker_blocks=1), np.random.default_rng(1)
    header, whole = read_header(data), simplejpeg.decode_jpeg(data)
    assert header.is_cut and (header.height, header.width) == whole.shape[:2]
    for _ in range(100):
        height, width = rng.integers(1, 78), rng.integers(1, 101)
        top, left = int(rng.integers(0, 78 - height)), int(rng.integers(0, 101 - width))
        part, (y, x, h, w) = part_of(data, header, (top, left, int(height), int(width)))
        found = simplejpeg.decode_jpeg(part)[y : y + h, x : x + w]
        np.testing.assert_array_equal(found, whole[top : top + height, left : left + width])


def test_a_small_box_is_a_small_jpeg():
    data = jpeg(size=(256, 256), restart_marker_blocks=1)
    part, _ = part_of(data, read_header(data), (40, 40, 30, 30))
    assert simplejpeg.decode_jpeg_header(part)[:2] == (48, 48)


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"progressive": True, "restart_marker_blocks": 1}])
def test_jpegs_that_are_not_cut_stay_whole(options):
    data, box = jpeg(**options), (0, 0, 9, 9)
    header = read_header(data)
    assert not header.is_cut and part_of(data, header, box) == (data, box)


def test_a_jpeg_that_was_cut_short_stays_whole():
    data, box = jpeg(restart_marker_blocks=1)[:-200], (0, 0, 9, 9)
    assert part_of(data, read_header(data), box) == (data, box)


def test_a_jpeg_that_ends_in_its_header_has_none():
    data = jpeg()
    for size in range(data.index(b"\xff\xda") + 1, data.index(b"\xff\xda") + 5):
        assert read_header(data[:size]) is None


def test_what_needs_pillow_has_no_header():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = jpeg(exif=exif.tobytes())
    for data in (turned, jpeg("CMYK"), b"", b"\xff\xd8", jpeg()[:40], b"\x89PNG\r\n\x1a\n" + bytes(99)):
        assert read_header(data) is None
