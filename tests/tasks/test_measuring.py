import csv
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import mae_jax
from configs import digits
from mae_jax.data.augment import normalize
from mae_jax.data.sources import Digits
from mae_jax.runtime.errors import UserError
from tests.runs import mistake, read_json, run, run_task
from tests.tasks.test_meshes import run_on

pytestmark = pytest.mark.slow


def digits_split(split):
    """(normalised images, labels) of the digits."""
    source, data = Digits(split), digits.get_config().data
    images = np.stack([source[i]["image"] for i in range(len(source))])
    return normalize(images, data), source.labels()


@pytest.fixture(scope="module")
def frozen(pretrained):
    """{split: (features, labels)}, made with the Python API."""
    encode = jax.jit(lambda images: mae_jax.load(pretrained).encode(images)[:, 1:].mean(axis=1))
    return {s: (np.asarray(encode(images)), labels) for s in ("train", "eval") for images, labels in [digits_split(s)]}


@pytest.fixture(scope="module")
def features(pretrained, tmp_path_factory):
    return run_task(
        "features", tmp_path_factory.mktemp("runs") / "features", features__format="npy", init_from=str(pretrained)
    )


def test_features_on_disk_are_the_encoders(features, frozen):
    for split, (expected, labels) in frozen.items():
        found = np.load(features / f"{split}_features.npy")
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # batches of another size
        np.testing.assert_array_equal(np.load(features / f"{split}_labels.npy"), labels)
    assert read_json(features / "result.json")["train_features"] == [1437, 16]
    assert not list(features.glob("*.tmp"))


def test_knn_of_one_neighbour_is_scikit_learns_and_the_sweep_has_every_pair(pretrained, frozen, tmp_path, capsys):
    workdir = run_task("knn", tmp_path / "knn", init_from=str(pretrained), evaluate__knn_sweep_k=(1, 7))
    result = read_json(workdir / "result.json")
    sweep = {(row["k"], row["temperature"]): row["top1"] for row in result["sweep"]}
    assert sweep.keys() == {(k, t) for k in (1, 7, 20) for t in (0.03, 0.07, 0.2)}
    unit = {s: (x / np.linalg.norm(x, axis=1, keepdims=True), y) for s, (x, y) in frozen.items()}
    expected = KNeighborsClassifier(1).fit(*unit["train"]).score(*unit["eval"])
    assert sweep[1, 0.07] == pytest.approx(expected, abs=1.5 / 360)  # a tie in float32 may fall the other way
    assert result["knn/top1"] == sweep[20, 0.07] and result["knn/best_top1"] == max(sweep.values())
    assert 0 < result["random_encoder/knn/top1"] < 1
    out = capsys.readouterr().out
    assert "T 0.07" in out
    best = "k {knn/best_k}, temperature {knn/best_temperature}: top-1 {knn/best_top1:.2%}".format_map(result)
    assert f"best: {best} (chosen on the evaluation images themselves" in out
    assert "1,437 training images in digits train, 360 evaluation images in digits eval, centre crops" in out


def test_logistic_regression_is_scikit_learns(pretrained, frozen, tmp_path, capsys):
    settings = dict(evaluate__probe_sweep_c=(0.1,), evaluate__random_encoder=False)
    workdir = run_task("logistic_regression", tmp_path, init_from=str(pretrained), **settings)
    result = read_json(workdir / "result.json")
    probe = LogisticRegression(C=0.1, max_iter=5000, tol=1e-6).fit(*frozen["train"])
    found = {row["c"]: row["top1"] for row in result["sweep"]}
    assert found[0.1] == pytest.approx(probe.score(*frozen["eval"]), abs=1.5 / 360)
    assert result["logistic_regression/top1"] == found[1.0]
    best = "best: C {logistic_regression/best_c}: top-1 {logistic_regression/best_top1:.2%}".format_map(result)
    assert best in capsys.readouterr().out
    assert not any(name.startswith("random") for name in result)


def test_an_earlier_measurement_is_kept_and_says_what_was_measured(pretrained, tmp_path):
    for token in ("mean", "mean", "class"):
        run_task("features", tmp_path, features__format="npy", init_from=str(pretrained), evaluate__token=token)
    first, last = (read_json(tmp_path / name) for name in ("result.1.json", "result.json"))
    assert "mean of" in first["protocol"] and "class token" in last["protocol"]
    assert first["measured"]["init_from"] == str(pretrained) and first["measured"]["data.name"] == "digits"
    assert not (tmp_path / "result.2.json").exists()


def test_a_measurement_that_is_refused_leaves_the_earlier_one(pretrained, tmp_path):
    run_task("evaluate", tmp_path, init_from=str(pretrained))
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(UserError, match="mask_ratio=0.99"):
        run_task("evaluate", tmp_path, init_from=str(pretrained), evaluate__mask_ratio=0.99)
    assert (tmp_path / "result.json").read_text() == before


def test_evaluating_an_autoencoder_gives_the_loss_that_its_run_reported_and_pictures(pretrained, tmp_path):
    workdir = run_task("evaluate", tmp_path, init_from=str(pretrained))
    expected = read_json(pretrained / "result.json")["eval/loss"]
    assert read_json(workdir / "result.json")["eval/loss"] == pytest.approx(expected, rel=1e-6)
    assert (workdir / "reconstructions" / "40.png").exists()


@pytest.fixture(scope="module")
def evaluated(finetuned, tmp_path_factory):
    """The workdir of an evaluation of a classifier on eight devices, with a last batch that is not full."""
    workdir = tmp_path_factory.mktemp("runs") / "evaluated"
    return run_task("evaluate", workdir, init_from=str(finetuned), evaluate__batch_size=100)


def test_evaluating_a_classifier_gives_the_numbers_that_its_run_reported(evaluated, finetuned):
    found, expected = read_json(evaluated / "result.json"), read_json(finetuned / "result.json")
    assert found["images"] == 360 and found["correct"] == round(360 * expected["eval/top1"])
    for name in ("eval/top1", "eval/top5"):
        assert found[name] == expected[name]
    assert found["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)


def test_counts_are_the_same_on_one_device_and_are_those_of_the_python_api(evaluated, finetuned, tmp_path, capsys):
    run_on(None, "evaluate", tmp_path, init_from=str(finetuned), evaluate__batch_size=64)
    out = capsys.readouterr().out
    ours, theirs = read_json(tmp_path / "result.json"), read_json(evaluated / "result.json")
    assert (ours["correct"], ours["images"], ours["eval/top5"]) == (
        theirs["correct"], theirs["images"], theirs["eval/top5"],
    )  # fmt: skip
    assert (tmp_path / "classes.csv").read_text() == (evaluated / "classes.csv").read_text()
    images, labels = digits_split("eval")
    predicted = np.asarray(jax.jit(mae_jax.load(finetuned).__call__)(images)).argmax(axis=1)
    assert ours["correct"] == np.sum(predicted == labels)
    assert "often taken for" in out and "top-1" in out


def test_a_classifiers_class_table_and_picture_are_written(evaluated):
    rows = list(csv.DictReader((evaluated / "classes.csv").open()))
    assert [row["class"] for row in rows] == [str(digit) for digit in range(10)]
    assert sum(int(row["images"]) for row in rows) == 360
    hits = sum(float(row["recall"]) * int(row["images"]) for row in rows)
    assert round(hits) == read_json(evaluated / "result.json")["correct"]
    assert Image.open(evaluated / "confusion_matrix.png").size[0] > 300


def test_features_of_a_classifier_are_those_of_its_encoder(finetuned, tmp_path):
    workdir = run_task("features", tmp_path, features__format="npy", init_from=str(finetuned))
    images, _ = digits_split("eval")
    model = mae_jax.load(finetuned)
    expected = jax.jit(lambda images: model.encode(images)[:, 1:].mean(axis=1))(images)
    np.testing.assert_allclose(np.load(workdir / "eval_features.npy"), expected, rtol=1e-4, atol=1e-5)


def test_other_data_can_be_named_on_the_command_line(pretrained, tmp_path):
    code, _, err = run(
        "--config=configs/features.py", f"--config.init_from={pretrained}", f"--workdir={tmp_path}",
        "--config.data.name=synthetic", "--config.data.num_examples=64", "--config.evaluate.max_train_examples=40",
    )  # fmt: skip
    assert code == 0, err
    result = read_json(tmp_path / "result.json")
    assert result["images"] == {"train": 40, "eval": 16} and (tmp_path / "features.parquet").exists()


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(model__mask_ratio=0.5), "model.mask_ratio=0.5 is 0.75 in the checkpoint"),
        (dict(data__eval_crop=0.5), "data.eval_crop=0.5 is 1.0 in the checkpoint"),
        (dict(data__path="/nowhere"), "--config.data.name=image_folder"),
        (dict(data__eval_fraction=0.5, given=("data.eval_fraction",)), "is not used with data.name=digits"),
        (dict(evaluate__knn_sweep_k=(1.5,)), "knn_sweep_k=(1.5,) must be whole numbers"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(pretrained, tmp_path, settings, expected):
    assert expected in mistake("knn", tmp_path / "run", init_from=str(pretrained), **settings)


def test_masks_are_refused_where_a_classifier_is_evaluated(finetuned, tmp_path):
    settings = dict(init_from=str(finetuned), evaluate__mask_ratio=0.5, given=("evaluate.mask_ratio",))
    message = mistake("evaluate", tmp_path / "run", **settings)
    assert "evaluate.mask_ratio=0.5 is not for the task evaluate a classifier" in message


def test_data_with_other_classes_than_the_classifiers_are_refused(finetuned, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "pictures" / name / f"{number}.png")
    settings = dict(data__name="image_folder", data__path=str(tmp_path / "pictures"))
    message = mistake("evaluate", tmp_path / "run", init_from=str(finetuned), **settings)
    assert "the class 'cat', 'dog', which" in message and "it has '0', '1'" in message


def test_a_class_folder_that_is_named_is_counted_whole_its_classes_matched_by_name(finetuned, pretrained, tmp_path):
    digits = Digits("eval")
    for index in range(40):
        name = digits.class_names[digits[index]["label"]]
        if name in "379":
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits[index]["image"][..., 0]).save(tmp_path / f"pictures/{name}/{index}.png")
    count = len(list(tmp_path.glob("pictures/*/*.png")))
    settings = dict(data__name="image_folder", data__path=str(tmp_path / "pictures"), evaluate__random_encoder=False)
    workdir = run_task("evaluate", tmp_path / "evaluate", init_from=str(finetuned), **settings)
    assert read_json(workdir / "result.json")["images"] == count > 8
    rows = list(csv.DictReader((workdir / "classes.csv").open()))
    assert [row["class"] for row in rows if int(row["images"])] == ["3", "7", "9"]
    place = {name: value for name, value in settings.items() if name.startswith("data")}
    workdir = run_task("features", tmp_path / "features", features__format="npy", init_from=str(finetuned), **place)
    assert set(np.load(workdir / "eval_labels.npy")) == {3, 7, 9}
    workdir = run_task("knn", tmp_path / "knn", init_from=str(pretrained), **settings)
    images = f"1,437 training images in digits train, {count} evaluation images in {tmp_path}/pictures (all of it)"
    assert images in read_json(workdir / "result.json")["protocol"]
    assert read_json(workdir / "result.json")["knn/top1"] > 0.3  # chance is a tenth


def test_an_evaluation_folder_may_have_a_class_that_the_training_folder_lacks_if_the_classifier_knows_it(
    finetuned, tmp_path
):
    digits = Digits("eval")
    for split, names in (("train", "37"), ("validation", "379")):
        for index in (i for i in range(40) if digits.class_names[digits[i]["label"]] in names):
            name = digits.class_names[digits[index]["label"]]
            (tmp_path / "pictures" / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(digits[index]["image"][..., 0]).save(tmp_path / f"pictures/{split}/{name}/{index}.png")
    settings = dict(init_from=str(finetuned), data__name="image_folder", data__path=str(tmp_path / "pictures"))
    workdir = run_task("evaluate", tmp_path / "evaluate", **settings)
    rows = list(csv.DictReader((workdir / "classes.csv").open()))
    assert [row["class"] for row in rows if int(row["images"])] == ["3", "7", "9"]
    # What learns from the training pictures needs to find the class there.
    assert "the class '9', which the training data" in mistake("knn", tmp_path / "knn", **settings)


def test_the_evaluators_that_a_command_names_measure_a_checkpoint(pretrained, finetuned, tmp_path, capsys):
    trained = read_json(pretrained / "result.json")
    names = ("loss", "knn", "rankme")
    workdir = run_task("evaluate", tmp_path / "mae", init_from=str(pretrained), evaluate__evaluators=names)
    found = read_json(workdir / "result.json")
    assert found["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-6)
    assert found["eval/knn/top1"] == trained["knn/top1"]
    assert found["eval/rankme"] == pytest.approx(trained["rankme"], rel=1e-5)
    assert not (workdir / "reconstructions").exists() and "rankme 2." in capsys.readouterr().out
    workdir = run_task("evaluate", tmp_path / "classifier", init_from=str(finetuned), evaluate__evaluators=("knn",))
    assert read_json(workdir / "result.json").keys() >= {"eval/knn/top1", "images"}
    assert "is not one of accuracy" in mistake(
        "evaluate", tmp_path / "unknown", init_from=str(pretrained), evaluate__evaluators=("top",)
    )


def test_features_need_no_labels(pretrained, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(tmp_path / "pictures" / f"{number}.png")
    settings = dict(data__name="image_folder", data__path=str(tmp_path / "pictures"))
    workdir = run_task("features", tmp_path / "run", features__format="npy", init_from=str(pretrained), **settings)
    assert np.load(workdir / "eval_features.npy").shape == (20, 16) and not (workdir / "train_features.npy").exists()
    np.testing.assert_array_equal(np.load(workdir / "eval_labels.npy"), [-1] * 20)
    message = mistake("features", tmp_path / "share", init_from=str(pretrained), data__label_fraction=0.5, **settings)
    assert "data.label_fraction=0.5 takes a share of the pictures to learn from" in message


@pytest.mark.parametrize("name", ["knn", "logistic_regression", "features", "evaluate"])
def test_what_is_measured_must_be_named_and_lie_elsewhere(name, pretrained, tmp_path):
    assert "init_from is not set" in mistake(name, tmp_path / "run")
    before = (pretrained / "result.json").read_text()
    with pytest.raises(UserError, match="belongs to a training run"):
        run_task(name, pretrained, init_from=str(pretrained))
    assert (pretrained / "result.json").read_text() == before


def test_reconstructions_of_a_classifier_are_refused(finetuned, tmp_path):
    assert "no decoder" in mistake("reconstruct", tmp_path / "run", init_from=str(finetuned))


def test_pre_training_is_watched(pretrained):
    lines = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    watched = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in watched] == [20, 40]
    for line in watched:
        assert {"eval/knn/top1", "eval/linear_probe/top1", "eval/rankme"} < line.keys()
        assert 1 <= line["eval/rankme"] <= 16
    events = b"".join(path.read_bytes() for path in pretrained.glob("events.out.tfevents*"))
    assert b"eval/rankme" in events and b"eval/knn/top1" in events


def test_what_was_trained_with_a_value_range_is_measured_with_it(pretrained, tmp_path):
    workdir = tmp_path / "scaled"  # as if it had been trained so
    step = shutil.copytree(pretrained / "checkpoints" / "40", workdir / "checkpoints" / "40")
    about = read_json(step / "about" / "metadata")
    about["config"]["data"]["value_range"] = (0, 128)
    (step / "about" / "metadata").write_text(json.dumps(about))
    (step / "SHA256SUMS").unlink()
    measured = run_task("features", tmp_path / "features", features__format="npy", init_from=str(workdir))
    model, source = mae_jax.load(workdir), Digits("eval")
    images = model.processor([source[i]["image"] for i in range(8)])
    expected = model.encode(images)[:, 1:].mean(axis=1)
    np.testing.assert_allclose(np.load(measured / "eval_features.npy")[:8], expected, atol=1e-5)
    told = mistake("features", tmp_path / "other", init_from=str(workdir), data__value_range=(0, 255))
    assert "data.value_range=(0, 255) is (0, 128) in the checkpoint and cannot be changed here" in told


def test_a_checkpoint_of_8_bit_pictures_is_measured_on_others_with_the_range_that_is_given(pretrained, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.asarray(Digits("eval")[i]["image"][..., 0], np.uint16) * 16).save(folder / f"{i}.png")
    settings = dict(init_from=str(pretrained), data__name="image_folder", data__path=str(folder))
    assert "data.value_range=(low, high)" in mistake("features", tmp_path / "refused", **settings)
    measured = run_task(
        "features", tmp_path / "taken", features__format="npy", data__value_range=(0, 16 * 255), **settings
    )
    model = mae_jax.load(pretrained)
    expected = model.encode(model.processor([Digits("eval")[i]["image"] for i in range(4)]))[:, 1:].mean(axis=1)
    found = np.concatenate([np.load(file) for file in sorted(measured.glob("*_features.npy"))])
    assert len(found) and np.abs(found[:, None] - expected).max(axis=2).min(axis=1).max() < 1e-4
