import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_pipeline
from benchmarks.input_programs import Job, opencv_cubic, pillow, plain_box, quality, simplejpeg_and_pillow


@pytest.fixture
def folder(tmp_path):
    """Nine JPEGs of two classes."""
    for index in range(9):
        file = tmp_path / "pictures" / "train" / f"class{index % 2}" / f"{index}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(index).integers(0, 256, (8, 9, 3), np.uint8)
        Image.fromarray(coarse).resize((90 + index, 70)).save(file)
    return tmp_path / "pictures"


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["input_pipeline", *arguments])
    input_pipeline.main()


def test_every_program_that_is_installed_gets_a_row_of_numbers_that_belong_together(folder, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("benchmarks.input_programs.BACKENDS", {"Pillow": ("PIL", pillow)})  # each takes seconds
    file = tmp_path / "measured.json"
    run(monkeypatch, str(folder), "--against=torch", "--workers", "0", "--size=16", "--batch=4", "--rounds=2",
        "--seconds=0.05", f"--json={file}")  # fmt: skip
    measured = json.loads(file.read_text())
    rows = {row["program"]: row for row in measured["rows"]}
    assert {"mae_jax", "Pillow", "torch DataLoader"} <= rows.keys() and rows.keys().isdisjoint({"tf.data"})
    assert all(name.split(" (")[0] not in rows for name in measured["missing"])
    for row in rows.values():
        least, most = row["images_per_second_range"]
        assert 0 < least <= row["images_per_second"] <= most
        assert row["images_per_second_per_core"] == pytest.approx(row["images_per_second"] / measured["cores"])
        assert row["cpu_ms_per_image"] > 0 and row["ratio"] > 0
    assert rows["mae_jax"]["ratio"] == rows["mae_jax"]["cpu_ratio"] == 1
    assert rows["Pillow"]["same_bits"] and rows["Pillow"]["decibels"] is None


def test_the_quality_is_the_noise_against_pillow_and_infinite_for_the_same_bits(folder):
    source = Job(str(folder), 16, 4, 0).source()
    assert quality(pillow, source, 16) == math.inf
    one_more = quality(lambda *arguments: pillow(*arguments).astype(int) + 1, source, 16)
    assert one_more == pytest.approx(20 * math.log10(255))


@pytest.mark.parametrize("package, backend", [("simplejpeg", simplejpeg_and_pillow), ("cv2", opencv_cubic)])
def test_other_back_ends_crop_the_same_box(folder, package, backend):
    pytest.importorskip(package)
    assert quality(backend, Job(str(folder), 16, 4, 0).source(), 16) > 20


def test_torchs_boxes_lie_inside_the_picture():
    for _ in range(200):
        top, left, height, width = plain_box(60, 45)
        assert min(top, left) >= 0 and min(height, width) > 0 and top + height <= 60 and left + width <= 45


@pytest.mark.parametrize("arguments, message", [
    (["no/such/folder"], "no/such/folder cannot be read: No such file"),
    ([".", "--against=jax"], "only torch and tf can be compared with"),
])  # fmt: skip
def test_mistakes_get_one_line(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]
