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


def test_settings_that_do_not_fit_the_pictures_stop_nothing_and_are_told(folder, tmp_path, capsys):
    (tmp_path / "statistics.json").write_text("{}")
    odd = {"data__color_jitter": 0.4, "evaluate__shown_channels": 9, "inspect__crops": 2, "model__image_size": 16}
    run_task("inspect", tmp_path, data__name="image_folder", data__path=str(folder), model__patch_size=4, **odd)
    told = capsys.readouterr().out
    assert "note: data.color_jitter=0.4 takes 8-bit" in told and "note: evaluate.shown_channels=9 must be" in told
    assert (tmp_path / "overview.png").exists() and read_json(tmp_path / "statistics.json")["channels"] == 4


def test_pictures_that_are_all_bad_are_told_and_no_file_of_an_earlier_look_is_left(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for n in range(3):
        (tmp_path / f"pictures/{n}.jpg").write_text("version https://git-lfs.github.com/spec/v1")
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "statistics.json").write_text("{}")
    run_task("inspect", workdir, data__name="image_folder", data__path=str(tmp_path / "pictures"))
    told = capsys.readouterr().out
    assert "no picture can be drawn" in told and "3 of 3 pictures are bad" in told
    assert read_json(workdir / "result.json")["bad"] == 3 and not (workdir / "statistics.json").exists()


@pytest.mark.parametrize("task", ["inspect", "prepare"])
def test_pages_are_no_colours(task, tmp_path, capsys):
    import tifffile

    (tmp_path / "scans").mkdir()
    for n in range(20):
        values = np.random.default_rng(n).integers(0, 256, (3 if n < 10 else 1, 40, 40)).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"scans/{n:02}.tif", values, photometric="minisblack")
    settings = dict(data__name="image_folder", data__path=str(tmp_path / "scans"))
    settings |= dict(model__image_size=16, model__patch_size=4)
    if task == "prepare":
        told = mistake(task, tmp_path / "run", **settings, prepare__short_side=20)
    else:
        run_task(task, tmp_path / "run", **settings)
        told = capsys.readouterr().out
    assert "a file of 3 pages: save each as a file" in told


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_greys_and_colours_are_measured_as_the_model_sees_them(channels, dtype, tmp_path):
    rng, wanted = np.random.default_rng(0), []
    for split, n in ((split, n) for split in ("train", "val") for n in range(6)):
        pixels = rng.integers(0, 256, (20, 20, 3) if n % 3 else (20, 20)).astype(np.uint8)
        file = tmp_path / "pictures" / split / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        if split == "train":
            seen = Image.fromarray(pixels).convert("L" if channels == 1 else "RGB")
            wanted.append(np.asarray(seen).reshape(-1, channels) / 255)
    settings = dict(model__image_size=16, model__patch_size=4, model__channels=channels, inspect__crops=6)
    run_task("inspect", tmp_path / "run", data__name="image_folder", data__path=str(tmp_path / "pictures"),
             data__dtype=dtype, data__value_range=(0, 255), **settings)  # fmt: skip
    found = read_json(tmp_path / "run/statistics.json")
    tolerance = 1e-9 if dtype is None else 0.6 / 255  # of pictures of floats, luminance is not rounded
    np.testing.assert_allclose(found["mean"], np.concatenate(wanted).mean(0), atol=tolerance)
    assert found["channels"] == channels and Image.open(tmp_path / "run/overview.png").width > 50


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
