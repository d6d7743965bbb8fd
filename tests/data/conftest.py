"""Settings and small pictures for the tests of the data."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.common import get_config


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
