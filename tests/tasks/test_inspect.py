"""The task inspect: what it writes about pictures, and that nothing about them is an error."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from configs.common import get_config
from mae_jax.data.inspecting import Findings, Look, describe_statistics
from mae_jax.data.statistics import BandStatistics
from mae_jax.evaluation.overview import draw_crops, to_display
from tests.runs import mistake, read_json, run_task


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 8 stacks of 4 bands for training, with no data in places, and one of 4; a bad and an odd file."""
    root, rng = tmp_path_factory.mktemp("stacks"), np.random.default_rng(0)
    for split, kind, count in (("train", "ant", 8), ("train", "bee", 8), ("val", "ant", 4)):
        (root / split / kind).mkdir(parents=True)
        for n in range(count):
            values = rng.normal(1000, 50, (24 + n, 32, 4)).astype(np.float32) * [1, 2, 3, 4]
            values[:4, :4] = np.nan
            np.save(root / split / kind / f"{n}.npy", values.astype(np.float32))
    (root / "train/ant/damaged.npy").write_bytes(b"\x93NUMPY")
    np.save(root / "train/bee/odd.npy", np.zeros((9, 9, 2), np.int16))
    return root


@pytest.fixture(scope="module")
def inspected(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "inspect"
    small = {"model__image_size": 16, "model__patch_size": 4, "inspect__crops": 6}
    return run_task("inspect", workdir, data__name="image_folder", data__path=str(folder), **small)


def test_statistics_are_those_of_the_training_pictures_of_the_usual_kind(folder, inspected):
    files = [file for file in (folder / "train").rglob("[0-9].npy")]
    values = np.concatenate([np.load(file).reshape(-1, 4) for file in files]).astype(np.float64)
    found = read_json(inspected / "statistics.json")
    np.testing.assert_allclose(found["mean"], np.nanmean(values, 0), rtol=1e-12)
    np.testing.assert_allclose(found["std"], np.nanstd(values, 0), rtol=1e-12)
    assert found["no_data"] == pytest.approx(np.isnan(values).mean())
    told = [found[name] for name in ("dtype", "bands", "channels", "value_range", "pictures")]
    assert told == ["float32", None, 4, None, 20]


def test_classes_are_counted_in_both_splits(inspected):
    rows = list(csv.reader((inspected / "classes.csv").open()))
    assert rows == [["class", "training", "evaluation"], ["ant", "9", "4"], ["bee", "9", "0"]]


def test_slow_large_and_bad_files_are_listed(folder, inspected):
    rows = list(csv.DictReader((inspected / "files.csv").open()))
    bad = [row for row in rows if row["list"] == "bad"]
    assert [row["file"] for row in bad] == [f"{folder}/train/ant/damaged.npy"] and bad[0]["reason"]
    slow = [float(row["ms"]) for row in rows if row["list"] == "slow"]
    assert slow == sorted(slow, reverse=True)
    assert next(row["height"] for row in rows if row["list"] == "large") == "31"


def test_kinds_are_told_with_an_example_of_each(folder, inspected):
    found = read_json(inspected / "result.json")
    kinds = {(kind["dtype"], kind["channels"]): (kind["pictures"], kind["example"]) for kind in found["kinds"]}
    assert kinds["int16", 2] == (1, f"{folder}/train/bee/odd.npy") and kinds["float32", 4][0] == 20
    assert (found["bad"], found["looked_at"], found["images"]) == (1, 22, {"train": 18, "eval": 4})


def test_the_overview_is_a_picture_of_the_crops(inspected):
    assert np.asarray(Image.open(inspected / "overview.png")).std() > 10


def test_the_line_that_is_printed_makes_a_run(folder, tmp_path, capsys, inspected):
    settings = {
        "data__name": "image_folder",
        "data__path": str(folder),
        "model__image_size": 16,
        "model__patch_size": 4,
    }
    limited = {"inspect__max_examples": 5, "inspect__crops": 2, "data__bands": (3, 1)}
    run_task("inspect", tmp_path / "few", **settings, **limited)
    found = read_json(tmp_path / "few/statistics.json")
    assert (found["bands"], found["channels"]) == ([3, 1], 2) and 3900 < found["mean"][0] < 4100
    assert f"--config.data.statistics={tmp_path}/few/statistics.json" in capsys.readouterr().out
    assert read_json(tmp_path / "few/result.json")["looked_at"] == 9


def test_without_a_name_of_data_there_is_nothing_to_inspect(tmp_path):
    assert "data.name is not set" in mistake("inspect", tmp_path / "run", data__name=None)


def test_deep_channels_are_stretched_to_their_percentiles_and_no_data_is_grey():
    images = np.random.default_rng(0).normal(500, 100, (4, 16, 16, 5)).astype(np.float32)
    images[0, 0, 0] = np.nan
    shown, words = to_display(images, [4, 2, 0])
    low, high = (np.nanpercentile(images[..., 4], p) for p in (2, 98))
    wanted = np.clip((images[1:, ..., 4] - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(shown[1:, ..., 0], wanted, atol=1)
    assert len(set(shown[0, 0, 0].tolist())) == 1 and f"{low:.5g} to {high:.5g}" in words


def test_pictures_of_8_bits_are_drawn_as_they_are_with_their_names():
    images = np.random.default_rng(0).integers(0, 256, (5, 100, 120, 3)).astype(np.uint8)
    shown, words = to_display(images, None)
    np.testing.assert_array_equal(shown, images)
    sheet = draw_crops(shown, ["ant", "a name that is far too long for so small a picture", "", "", ""], ["caption"])
    rows = [sheet[y : y + 100, 6:126] for y in range(sheet.shape[0] - 100)]
    assert words == "" and any(np.array_equal(row, images[0]) for row in rows)


def test_json_files_hold_no_nan(inspected):
    for name in ("statistics.json", "result.json"):
        json.loads((inspected / name).read_text(), parse_constant=pytest.fail)


def test_greys_among_colours_count_once_however_often_one_asks():
    found = Findings()
    for value, kind in ((0, ("uint8", 1)), (255, ("uint8", 3))):
        found.looks.append(Look("train", len(found.looks), kind=kind))
        found.statistics[kind] = BandStatistics.of(np.full((4, 4, kind[1]), value, np.uint8))
    for _ in range(3):
        assert describe_statistics(found, get_config().data)["mean"] == [0.5, 0.5, 0.5]
        assert found.main_kind() == ("uint8", 3) and found.usable("train") == [0, 1]
    del found.statistics["uint8", 1]  # the greys are for evaluation
    assert describe_statistics(found, get_config().data)["mean"] == [1, 1, 1]
