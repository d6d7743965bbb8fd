import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_decoders
from benchmarks.input_programs import quality


@pytest.fixture
def folder(tmp_path):
    """Five JPEGs larger than `made_smaller` leaves them, a turned one and a PNG."""
    path = tmp_path / "pictures" / "train"
    path.mkdir(parents=True)
    for index in range(7):
        coarse = np.random.default_rng(index).integers(0, 256, (8, 9, 3), np.uint8)
        picture, exif = Image.fromarray(coarse).resize((400 + index, 300)), Image.Exif()
        exif[0x0112] = 6 if index == 5 else 1
        picture.save(path / f"{index}.jpg", "PNG" if index == 6 else "JPEG", exif=exif)
    return path.parent


def test_each_way_that_is_installed_gets_a_rate_for_stored_and_for_smaller_pictures(folder, monkeypatch, capsys):
    file = folder / "measured.json"
    command = ["input_decoders", str(folder), "--size=64", "--rounds=1", "--need=1e5", "--cores", "2", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(input_decoders, "DECODERS", {"none": ("no_such_package", None)})
    input_decoders.main()
    rows = json.loads(file.read_text())
    titles = ("as they are", "made smaller")
    assert [(row["pictures"], row["program"]) for row in rows] == [
        (t, p) for t in titles for p in ("Pillow", "mae_jax")
    ]
    for row in rows:
        assert row["rate"] == pytest.approx(1000 / row["cpu_ms"])
        assert row["wait"] == [pytest.approx(1 - 2 * row["rate"] / 1e5)]
    assert all(row["decibels"] is None and row["ratio"] == 1 for row in rows[::2])
    assert all(row["decibels"] is None or row["decibels"] > 50 for row in rows)
    text = capsys.readouterr().out
    assert "pictures as they are: 402 x 300 pixels" in text and "pictures made smaller: 343 x 256 pixels" in text


def test_enough_cores_never_let_a_device_wait():
    assert input_decoders.wait(rate=440, cores=16, need=7000) == 0
    assert input_decoders.wait(rate=350, cores=16, need=7000) == pytest.approx(0.2)


@pytest.mark.parametrize("name", ["simplejpeg, cykooz-resizer", "OpenCV, halved by the decoder, Pillow bicubic"])
def test_each_way_cuts_the_same_box(folder, name):
    package, backend = input_decoders.DECODERS[name]
    pytest.importorskip(package)
    pictures = [{"image": (folder / f"train/{index}.jpg").read_bytes()} for index in range(5)]
    assert quality(backend, pictures, 64) > 30
