"""The errors of reconstruction, picture by picture: the table, its order, and how well it tells outliers."""

import csv
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import mae_jax
from mae_jax.runtime.seeds import make_key
from tests.digit_files import write_digits
from tests.runs import mistake, one_device, read_json, run_task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 digits, 5 pictures of noise in a folder of their own, and a bad file."""
    root = write_digits(tmp_path_factory.mktemp("pictures"), 20, lambda n, digit: "digits")
    (root / "noise").mkdir()
    for n, image in enumerate(np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)):
        Image.fromarray(image).save(root / "noise" / f"{n:02}.png")
    (root / "digits/bad.png").touch()
    return root


@pytest.fixture(scope="module")
def measured(pretrained, folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "errors"
    return run_task("reconstruct", workdir, init_from=str(pretrained), data__path=str(folder), reconstruct__masks=3,
                    reconstruct__outliers=("noise",), evaluate__batch_size=16)  # fmt: skip


def rows_of(workdir):
    return list(csv.DictReader((workdir / "errors.csv").open()))


def test_errors_are_the_mean_of_the_python_apis_losses_over_masks_the_largest_first(pretrained, folder, measured):
    model, rows = mae_jax.load(pretrained), [row for row in rows_of(measured) if not row["reason"]]
    errors = [float(row["error"]) for row in rows]
    assert errors == sorted(errors, reverse=True) and len(rows) == 25
    files = sorted(row["file"] for row in rows_of(measured))  # as they are listed
    key, places = make_key(0, "evaluate"), {file: place for place, file in enumerate(files)}
    for row in rows[:3] + rows[-3:]:
        keys = [key, *(jax.random.fold_in(key, 2**31 + draw) for draw in (1, 2))]
        image = model.processor([row["file"]])
        losses = [float(model(image, key=jax.random.fold_in(k, places[row["file"]])[None]).loss) for k in keys]
        assert float(row["error"]) == pytest.approx(np.mean(losses), rel=1e-4)
        assert float(row["std_over_masks"]) == pytest.approx(np.std(losses), rel=1e-2)


def test_outliers_are_ranked_by_the_area_under_scikit_learns_curve(measured):
    rows = [row for row in rows_of(measured) if not row["reason"]]
    outlier = [row["outlier"] == "yes" for row in rows]
    assert outlier == ["/noise/" in row["file"] for row in rows] and sum(outlier) == 5
    result = read_json(measured / "result.json")
    assert result["auroc"] == pytest.approx(roc_auc_score(outlier, [float(row["error"]) for row in rows]), abs=1e-9)
    assert (result["images"], result["bad"], result["outliers"]) == (25, 1, 5)


def test_a_bad_picture_is_the_last_row_and_no_picture_of_the_sheets(measured):
    assert rows_of(measured)[-1]["reason"] == "the file is empty" and rows_of(measured)[-1]["error"] == ""
    assert (measured / "errors.png").exists() and list((measured / "reconstructions").glob("*.png"))


def test_the_loss_is_that_of_the_task_evaluate(pretrained, tmp_path):
    with one_device():
        settings = dict(init_from=str(pretrained), evaluate__max_examples=30)
        ours = run_task("reconstruct", tmp_path / "ours", reconstruct__masks=2, **settings)
        theirs = run_task("evaluate", tmp_path / "theirs", **settings)
    losses = [read_json(folder / "result.json")["eval/loss"] for folder in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(rows_of(ours)) == 30


def test_names_of_no_class_are_refused(pretrained, folder, tmp_path):
    settings = dict(init_from=str(pretrained), data__path=str(folder))
    told = mistake("reconstruct", tmp_path / "run", reconstruct__outliers=("odd",), **settings)
    assert "reconstruct.outliers=odd is no class of the pictures" in told


def test_pictures_that_are_all_bad_are_a_table_of_reasons(pretrained, folder, tmp_path):
    (tmp_path / "bad").mkdir()
    shutil.copy(folder / "digits/bad.png", tmp_path / "bad/1.png")
    with one_device():
        workdir = run_task("reconstruct", tmp_path / "run", init_from=str(pretrained), data__path=str(tmp_path / "bad"))
    assert [row["reason"] for row in rows_of(workdir)] == ["the file is empty"]
    assert read_json(workdir / "result.json")["images"] == 0
