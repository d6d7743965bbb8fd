"""Listing pictures: nothing is lost without a word, and only regular files are pictures."""

import os
import socket
from collections import Counter

import pytest

from mae_jax.data import files
from mae_jax.data.files import Listing, describe_unread, list_pictures
from mae_jax.data.image_folder import PictureFiles
from mae_jax.runtime.errors import UserError
from tests.data.conftest import decode


def test_a_folder_that_cannot_be_read_is_an_error_and_not_a_class_less(tmp_path, write_pictures, monkeypatch):
    write_pictures(tmp_path, "cat/1.png", "dog/2.png")
    scandir = os.scandir

    def refuse(path):  # by hand, since root may read everything
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for make in (list_pictures, PictureFiles):
        with pytest.raises(UserError, match=f"{tmp_path}/dog cannot be read: Permission denied"):
            make(tmp_path)


@pytest.mark.parametrize("name", ["cat/2.png", "dog"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path, write_pictures, name):
    write_pictures(tmp_path, "cat/1.png")
    (tmp_path / name).symlink_to("/nowhere")
    for make in (list_pictures, PictureFiles):
        with pytest.raises(UserError, match=f"{tmp_path}/{name}, a link to /nowhere, cannot be read: No such file"):
            make(tmp_path)


def test_a_link_to_itself_is_an_error(tmp_path, write_pictures):
    write_pictures(tmp_path, "cat/1.png")
    (tmp_path / "dog").symlink_to(tmp_path / "dog")
    with pytest.raises(UserError, match="dog, a link .*dog, cannot be read: Too many levels of symbolic links"):
        list_pictures(tmp_path)


def test_pipes_sockets_devices_and_links_to_them_are_not_opened_and_counted(tmp_path, write_pictures, monkeypatch):
    write_pictures(tmp_path, "1.png")
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    os.mkfifo("pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        found = list_pictures(tmp_path)
        assert len(PictureFiles(tmp_path)) == 1
    assert found.files == ["1.png"]
    assert describe_unread(found) == ["4 files of types that are not read: pipe 2, device 1, socket 1"]
    with pytest.raises(UserError, match="pipe.png is not a picture"):
        PictureFiles("pipe.png")


def test_files_that_are_skipped_for_their_type_are_counted_in_one_line(tmp_path, write_pictures, monkeypatch):
    monkeypatch.setattr("mae_jax.data.files.EXTENSIONS", (".png",))  # as without pillow-heif
    write_pictures(tmp_path, "1.png", *(f"{i}.heic" for i in range(5)), "deep/er/6.HEIC", "notes.txt", "LICENSE")
    (line,) = describe_unread(list_pictures(tmp_path))
    assert line.startswith("8 files of types that are not read: .heic 6, .txt 1, without extension 1")
    assert line.endswith("; pip install pillow-heif reads .heic")
    many = describe_unread(Listing([], [], Counter({f".{n}": 1 for n in range(9)})))
    assert many == ["9 files of types that are not read: .0 1, .1 1, .2 1, .3 1, .4 1 and 4 more"]
    assert describe_unread(Listing([], [], Counter())) == []


def test_empty_class_folders_are_told(tmp_path, write_pictures):
    write_pictures(tmp_path, "cat/deep/1.png", "dog/.hidden.png", "__MACOSX/cat/2.png", "@eaDir/3.png")
    (tmp_path / "elk/deep").mkdir(parents=True)
    found = list_pictures(tmp_path)
    assert (found.files, found.empty) == (["cat/deep/1.png"], ["dog", "elk"])


def test_every_extension_that_pillow_has_for_a_format_that_we_read_counts():
    assert {".jfif", ".jpe", ".apng", ".dib", ".mpo", ".avif", ".jpg", ".tif"} <= set(files.EXTENSIONS)
    assert not {".eps", ".pdf", ".psd"} & set(files.EXTENSIONS)


@pytest.mark.skipif("HEIF" not in files.FORMATS, reason="needs pillow-heif")
def test_heic_is_read_where_pillow_heif_is_installed():
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 30, 90)).save(stream, "HEIF")
    image = decode(stream.getvalue(), 3, 10**6)
    assert image.shape == (16, 24, 3) and abs(image.astype(int) - (200, 30, 90)).max() < 8
    assert ".heic" in files.EXTENSIONS


def test_pillow_heif_is_registered_where_it_is_installed(tmp_path):
    import subprocess
    import sys

    stub = "from PIL import Image\n\n\ndef register_heif_opener():\n"
    stub += "    Image.register_open('HEIF', None)\n    Image.register_extension('HEIF', '.heic')\n"
    (tmp_path / "pillow_heif.py").write_text(stub)
    code = "import runpy; found = runpy.run_path('mae_jax/data/files.py'); print('HEIF' in found['FORMATS'], "
    code += "'.heic' in found['EXTENSIONS'])"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout == "True True\n"
