"""Files of pictures are read without waiting for writers and no further than a picture can reach."""

import os
import re
import time

import pytest

from mae_jax.data.decoding import BadImage
from mae_jax.data.files import MAX_BYTES, read_picture_file
from mae_jax.data.image_folder import PictureFiles
from mae_jax.data.loader import PictureReader
from mae_jax.data.processor import Processor
from mae_jax.runtime.errors import UserError
from tests.data.conftest import picture_bytes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "good.png").write_bytes(picture_bytes(0))
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.png", "wb") as stream:
        stream.truncate(20 * 10**9)
    return tmp_path


BAD = [("fifo.png", "it is no regular file"), ("zero.png", "it is no regular file"),
       ("sparse.png", "it has 20,000,000,000 bytes, more than 1,073,741,824")]  # fmt: skip


@pytest.mark.parametrize("name, reason", BAD)
def test_what_never_ends_or_never_begins_is_a_bad_picture_at_once(folder, make_config, name, reason):
    class Source:
        def __getitem__(self, index):
            return {"image": read_picture_file(folder / name), "label": -1}

    began = time.monotonic()
    with pytest.raises(BadImage, match=reason):
        PictureReader(Source(), make_config(), 3).read(0, lambda picture: picture.whole())
    assert time.monotonic() - began < 1  # neither waited for nor tried again


@pytest.mark.parametrize("name, reason", BAD)
def test_the_processor_refuses_it_in_one_line(folder, name, reason):
    with pytest.raises(UserError, match=f"{name} cannot be used: {reason}"):
        Processor((8, 8))(folder / name)


def test_an_ordinary_file_is_read_whole_also_through_a_link(folder):
    (folder / "link.png").symlink_to(folder / "good.png")
    assert read_picture_file(folder / "link.png") == (folder / "good.png").read_bytes()
    assert PictureFiles(folder / "link.png")[0]["image"] == picture_bytes(0)


def test_the_largest_file_has_room_for_16_bit_colours_of_the_largest_picture():
    assert 0 <= MAX_BYTES - 6 * 178_956_970 < 6  # Pillow's own limit of pixels


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.png"))):
        read_picture_file(tmp_path / "none.png")
    with pytest.raises(OSError, match="no regular file"):
        read_picture_file(tmp_path)
