"""What a classifier says of pictures, file by file: the table, the sheet and the scores."""

import csv
import shutil

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.evaluation.predicting import ClassRows, MultiRows, NumberRows
from tests.digit_files import write_digits
from tests.label_sources import Numbers, Several
from tests.runs import mistake, one_device, read_json, run_task

pytestmark = pytest.mark.slow


SMALL = dict(
    model__depth=1, data__batch_size=32, classifier__pool="class", optimizer__name="adamw",
    optimizer__warmup_epochs=0.0,
)  # fmt: skip


def table_of(workdir):
    return list(csv.DictReader((workdir / "predictions.csv").open()))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """30 digits as PNGs in folders of their classes, one of a folder that is no class, two bad files."""
    root = write_digits(tmp_path_factory.mktemp("digits"), 30, lambda n, digit: str(digit))
    (root / "other").mkdir()
    shutil.copy(root / "0/00.png", root / "other/copy.png")
    (root / "1/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    (root / "2/empty.png").touch()
    return root


@pytest.fixture(scope="module")
def predicted(finetuned, pictures, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "predicted"
    return run_task("predict", workdir, init_from=str(finetuned), data__path=str(pictures), evaluate__batch_size=16)


def test_on_eight_devices_each_file_is_a_row_with_what_the_python_api_says_of_it(finetuned, pictures, predicted):
    model, rows = mae_jax.load(finetuned), table_of(predicted)
    good = [row for row in rows if not row["error"]]
    assert len(rows) == 33 and len(good) == 31
    shares = jax.nn.softmax(model(model.processor([row["file"] for row in good])))
    for row, share in zip(good, np.asarray(shares), strict=True):
        order = np.argsort(-share)[:5]
        assert [row[f"class_{n}"] for n in range(1, 6)] == [str(place) for place in order]
        np.testing.assert_allclose([float(row[f"probability_{n}"]) for n in range(1, 6)], share[order], rtol=1e-4)
        folder = row["file"].split("/")[-2]
        assert row["label"] == ("" if folder == "other" else folder)
        assert row["correct"] == ("" if folder == "other" else "yes" if row["class_1"] == folder else "no")


def test_bad_files_are_rows_with_their_reasons(predicted):
    bad = {row["file"].rsplit("/", 1)[1]: row["error"] for row in table_of(predicted) if row["error"]}
    assert bad.keys() == {"damaged.png", "empty.png"} and bad["empty.png"] == "the file is empty"
    result = read_json(predicted / "result.json")
    assert (result["images"], result["bad"], result["labelled"]) == (31, 2, 30)


def test_scores_are_those_of_the_task_evaluate(finetuned, pictures, predicted, tmp_path):
    shutil.copytree(pictures, tmp_path / "pictures")
    for bad in ("1/damaged.png", "2/empty.png", "other/copy.png"):
        (tmp_path / "pictures" / bad).unlink()
    (tmp_path / "pictures/other").rmdir()
    settings = dict(init_from=str(finetuned), data__name="image_folder", data__path=str(tmp_path / "pictures"))
    with one_device():
        theirs = read_json(run_task("evaluate", tmp_path / "run", **settings) / "result.json")
    ours = read_json(predicted / "result.json")
    names = [name for name in theirs if name.startswith("eval/")]
    assert "eval/top1" in names and {n: ours[n] for n in names} == pytest.approx(
        {n: theirs[n] for n in names}, rel=1e-5
    )
    right = sum(row["correct"] == "yes" for row in table_of(predicted))
    assert ours["eval/top1"] == right / 30


def test_the_checkpoints_own_evaluation_pictures_are_taken_if_no_others_are_given(finetuned, tmp_path):
    workdir = run_task("predict", tmp_path, init_from=str(finetuned), evaluate__max_examples=20, predict__pictures=0)
    rows = table_of(workdir)
    assert len(rows) == 20 and {row["correct"] for row in rows} <= {"yes", "no"}
    assert not (workdir / "predictions.png").exists()


def test_one_picture_without_a_label_is_a_row_without_one(finetuned, pictures, tmp_path):
    with one_device():
        workdir = run_task("predict", tmp_path, init_from=str(finetuned), data__path=str(pictures / "3/03.png"),
                           predict__top=2)  # fmt: skip
    (row,) = table_of(workdir)
    assert list(row) == ["file", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert "eval/top1" not in read_json(workdir / "result.json")


def test_a_picture_that_is_deleted_meanwhile_is_a_row(finetuned, pictures, tmp_path, monkeypatch):
    shutil.copytree(pictures / "5", tmp_path / "5")
    files = sorted((tmp_path / "5").iterdir())
    from mae_jax.tasks import predict

    plain = predict.open_data

    def open_data(*arguments):
        files[1].unlink()
        return plain(*arguments)

    monkeypatch.setattr(predict, "open_data", open_data)
    with one_device():
        run_task("predict", tmp_path / "run", init_from=str(finetuned), data__path=str(tmp_path / "5"))
    rows = {row["file"]: row["error"] for row in table_of(tmp_path / "run")}
    assert rows.pop(str(files[1])) == "No such file or directory" and not any(rows.values())


def test_wrong_ones_come_first_and_then_the_least_sure():
    logits = np.log([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55]])
    found = ClassRows(["a", "b"], 5, True)(logits, np.array([0, 0, 0, -1]))
    assert np.argsort(-found.doubt).tolist() == [2, 3, 1, 0]
    assert found.cells[2] == ["b", "0.8", "a", "0.2", "a", "no"] and found.words[2] == "b 80% (a)"
    assert found.cells[3][-2:] == ["", ""]


def test_several_labels_have_a_probability_each_and_numbers_their_values():
    logits, labels = np.array([[2.0, -1.0], [0.1, -3.0]]), np.array([[1.0, 1.0], [np.nan, np.nan]])
    found = MultiRows(["a", "b"], True)(logits, labels)
    assert found.cells == [["0.880797", "0.268941", "a|b", "no"], ["0.524979", "0.0474259", "", ""]]
    assert found.doubt[0] > 1 > found.doubt[1]
    found = NumberRows(["x", "y"], (2.0, 10.0), True)(np.array([[1.0, 2.0], [5.0, 50.0]]), np.array([[1.0, 2.0]] * 2))
    assert found.cells[1] == ["5", "50", "1", "2"] and found.doubt.tolist() == [1, 1 + 4.8]


@pytest.mark.parametrize("kind, source", [("multi", Several), ("number", Numbers)])
def test_labels_of_other_kinds_are_predicted_with_the_scores_of_evaluate(kind, source, tmp_path):
    name = f"tests.label_sources:{source.__name__}"
    with one_device():
        tuned = run_task("linear_probe_digits", tmp_path / "tuned", data__name=name, **SMALL)
        workdir = run_task("predict", tmp_path / "run", init_from=str(tuned))
    ours, theirs = (read_json(folder / "result.json") for folder in (workdir, tuned))
    names = [name for name in theirs if name.startswith("eval/")]
    assert len(names) > 2 and {n: ours[n] for n in names} == pytest.approx({n: theirs[n] for n in names}, rel=1e-4)
    rows = table_of(workdir)
    assert list(rows[0])[1:-1] == (
        [*source("eval").class_names, "labels", "correct"]
        if kind == "multi"
        else ["ink", "digit", "label ink", "label digit"]
    )
    assert (workdir / "predictions.png").exists()


def test_a_table_without_labels_is_predicted_by_a_classifier_of_several(pictures, tmp_path):
    files = sorted(map(str, (pictures / "3").glob("*.png")))
    (tmp_path / "table.csv").write_text("file,label\n" + "".join(f"{file},\n" for file in files))
    with one_device():
        tuned = run_task("linear_probe_digits", tmp_path / "tuned", data__name="tests.label_sources:Several", **SMALL)
        workdir = run_task("predict", tmp_path / "run", init_from=str(tuned), data__name="table",
                           data__path=str(tmp_path / "table.csv"), data__label_separator="|")  # fmt: skip
    assert [row["file"] for row in table_of(workdir)] == files and read_json(workdir / "result.json")["labelled"] == 0


def test_an_autoencoder_and_a_wrong_path_are_refused(pretrained, finetuned, tmp_path):
    assert "is an autoencoder, which knows no classes" in mistake("predict", tmp_path / "a", init_from=str(pretrained))
    told = mistake("predict", tmp_path / "b", init_from=str(finetuned), data__path=str(tmp_path / "none"))
    assert f"data.path={tmp_path}/none" in told
