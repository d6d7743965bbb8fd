"""Settings and small pictures for the tests of the data."""

import io
import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.common import get_config
from mae_jax.data.decoding import open_picture
from mae_jax.data.loader import make_train_batches
from mae_jax.data.sources import make_source, make_sources
from mae_jax.runtime.errors import UserError

SIZE = (8, 8)  # of the synthetic pictures in batches


def decode(*arguments):
    """The whole picture of `open_picture`."""
    return open_picture(*arguments).whole()


@pytest.fixture
def make_config():
    """Returns a function: settings by name -> the group `data` of the default settings with these changed."""

    def make(**settings):
        data = get_config().data
        with data.ignore_type():  # batch sizes and limits that cannot be are tried too
            for name, value in settings.items():
                assert name in data, name
                data[name] = value
        return data

    return make


@pytest.fixture
def batches(make_config):
    """Returns a function (number of batches, settings, where) -> that many training batches of synthetic pictures."""

    def make(count, *, size_at=None, start_step=0, process_index=0, process_count=1, **settings):
        config = make_config(**{"name": "synthetic", "num_examples": 40, "batch_size": 12, **settings})
        source = make_source(config, "train", (12, 12), 3)
        iterator = make_train_batches(source, config, size_at or SIZE, 3, start_step=start_step,
                                      share=(process_index, process_count))  # fmt: skip
        result = list(itertools.islice(iterator, count))
        iterator.close()
        return result

    return make


def assert_same(left: list[dict], right: list[dict]):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def png_16_bit(values: np.ndarray) -> bytes:
    """A 16-bit PNG of [h, w] or [h, w, c], written byte by byte: Pillow writes no 16-bit colours."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def picture_bytes(seed: int, height: int = 20, width: int = 24, file_format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, file_format)
    return stream.getvalue()


@pytest.fixture
def write_pictures():
    """Returns a function that writes small pictures, each different, below a folder: (folder, relative names)."""

    def write(folder: Path, *names: str):
        for seed, name in enumerate(names):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture_bytes(seed))

    return write


@pytest.fixture
def open_folder(make_config):
    def open_split(path, split, **settings):
        return make_source(make_config(name="image_folder", path=str(path), **settings), split, (8, 8), 3)

    return open_split


def names(source, below) -> list[str]:
    return [source.name_of(i).removeprefix(f"{below}/") for i in range(len(source))]


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """The cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mae_jax"


@pytest.fixture
def open_both(make_config):
    """Returns a function (data.name, data.path, other settings) -> (training, evaluation) pictures."""

    def both(name, path, **settings):
        return make_sources(make_config(name=name, path=str(path), **settings), SIZE, 3)

    return both


@pytest.fixture
def refusal(open_both):
    """Returns a function: `open_both`'s arguments -> the one line that refuses them."""

    def refuse(*arguments, **settings):
        with pytest.raises(UserError) as error:
            open_both(*arguments, **settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse
