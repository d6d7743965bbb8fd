"""Single files: whole or not there, never written through a link, JSON that every reader takes."""

import json

import numpy as np
import pytest
from PIL import Image

from mae_jax.workdir.metrics import JsonLines
from mae_jax.workdir.writing import finite_or_null, replacing, save_picture, write_atomically, write_json


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, '{"a": 2}')
    assert json.loads(path.read_text()) == {"a": 1}
    monkeypatch.undo()
    write_json(path, {"a": 3})
    assert json.loads(path.read_text()) == {"a": 3}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_value_that_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "result.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "result.json", {"a": object()})
    assert json.loads((tmp_path / "result.json").read_text()) == {"a": 1}


def test_a_saved_picture_has_every_pixel(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = tmp_path / "new" / "folder" / "1.png"
    save_picture(path, picture)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    assert [file.name for file in path.parent.iterdir()] == ["1.png"]


WRITERS = {
    "config.json.tmp": lambda folder: write_json(folder / "config.json", {}),
    "1.png.tmp": lambda folder: save_picture(folder / "1.png", np.zeros((2, 2, 3), np.uint8)),
    "table.md": lambda folder: write_atomically(folder / "table.md", "x"),
    "metrics.jsonl": lambda folder: JsonLines(folder, {}, None).scalars(1, {}),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_follows_a_link(tmp_path, name):
    target, workdir = tmp_path / "target", tmp_path / "run"
    target.write_text("precious")
    workdir.mkdir()
    (workdir / name).symlink_to(target)
    try:
        WRITERS[name](workdir)
    except OSError:
        assert name == "metrics.jsonl"
    assert target.read_text() == "precious"
    assert not list(workdir.glob("*.tmp"))


def test_files_that_belong_together_appear_together_or_not_at_all(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as first, replacing(tmp_path / "b") as second:
        first.write_text("1")
        second.write_text(str(1 // 0))
    assert list(tmp_path.iterdir()) == []


def test_no_json_file_gets_a_number_that_json_does_not_have(tmp_path):
    nan, inf = float("nan"), float("inf")
    for value in (nan, inf, -inf, np.float64(nan)):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "result.json", {"a": [value]})
    assert list(tmp_path.iterdir()) == []
    measured = {"a": nan, "b": {"c": [inf, 1.5]}, "d": ("x", np.float64(-inf)), "e": 3, "f": None}
    write_json(tmp_path / "result.json", finite_or_null(measured))
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == {"a": None, "b": {"c": [None, 1.5]}, "d": ["x", None], "e": 3, "f": None}
