"""Several labels and numbers from training over evaluation and k-NN to an export."""

import csv
import dataclasses
import importlib.util
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import mae_jax
from mae_jax.data.augment import normalize
from mae_jax.interop.formats import export, fit, fold_batch_norm
from mae_jax.interop.transfer import describe_start, starting_params
from mae_jax.interop.weights import read_weights
from mae_jax.models.classifier import LABEL_FACTS, make_classifier_config
from tests.label_sources import SIZES, Numbers, Several
from tests.runs import mistake, one_device, read_json, run_task

pytestmark = pytest.mark.slow
SOURCES = {"multi": Several, "number": Numbers}
MAIN = {"multi": "mAP", "number": "r2"}
SMALL = dict(
    model__depth=1, data__batch_size=32, classifier__pool="class", optimizer__name="adamw",
    optimizer__warmup_epochs=0.0, optimizer__base_learning_rate=0.1,
)  # fmt: skip


@pytest.fixture(scope="module", params=SOURCES)
def trained(request, tmp_path_factory):
    """(kind, the workdir of a probe of random weights on kept features: what compiles fastest)."""
    kind, workdir = request.param, tmp_path_factory.mktemp("runs") / request.param
    name = f"tests.label_sources:{SOURCES[kind].__name__}"
    with one_device():
        return kind, run_task("linear_probe_digits", workdir, data__name=name, **SMALL)


def outputs_of(path, source):
    """What the Python API gives for all pictures of a source."""
    model = mae_jax.load(path)
    images = normalize(np.stack([source[i]["image"] for i in range(len(source))]), model.processor)
    return model, np.asarray(jax.jit(model.__call__)(images))


def test_what_is_evaluated_on_eight_devices_is_what_the_run_and_the_python_api_find(trained, tmp_path):
    kind, workdir = trained
    ours = read_json(run_task("evaluate", tmp_path, init_from=str(workdir), evaluate__batch_size=16) / "result.json")
    theirs = read_json(workdir / "result.json")
    names = [name for name in theirs if name.startswith("eval/")]
    assert f"eval/{MAIN[kind]}" in names and {name: ours[name] for name in names} == pytest.approx(
        {name: theirs[name] for name in names}, rel=1e-4
    )
    source = SOURCES[kind]("eval")
    model, outputs = outputs_of(workdir, source)
    assert model.label_kind == kind and outputs.shape == source.labels().shape
    if kind == "multi":
        rows = list(csv.DictReader((tmp_path / "classes.csv").open()))
        assert [int(row["tp"]) for row in rows] == ((outputs > 0) & (source.labels() > 0)).sum(axis=0).tolist()
        assert ours["average_precision"].keys() == set(source.class_names)
        assert (tmp_path / "average_precision.png").exists()
    else:  # in the data's units
        assert ours["eval/mae"] == pytest.approx(np.abs(outputs - source.labels()).mean(), rel=1e-4)
        assert np.abs(outputs.mean(axis=0) - source.labels().mean(axis=0)).max() < 30
        assert ours["numbers"].keys() == {"ink", "digit"} and (tmp_path / "scatter.png").exists()
        assert (tmp_path / "numbers.csv").exists()


def test_an_export_gives_the_same_outputs_and_says_their_kind(trained, tmp_path):
    kind, workdir = trained
    weights, source = read_weights(workdir), SOURCES[kind]("eval")
    export(weights, tmp_path / "huggingface", "huggingface")
    model, found = outputs_of(tmp_path / "huggingface", source)
    _, expected = outputs_of(workdir, source)
    assert model.label_kind == kind
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    problem = {"multi": "multi_label_classification", "number": "regression"}[kind]
    assert read_json(tmp_path / "huggingface" / "config.json")["problem_type"] == problem
    assert any("timm's files do not say" in note for note in fit(weights, "timm").notes)
    head = read_weights(tmp_path / "huggingface").params["head"]["linear"]["bias"]
    for format in ("timm", "facebook") if importlib.util.find_spec("torch") else ("timm",):
        export(fold(weights), tmp_path / format, format)
        other = read_weights(tmp_path / format)
        assert other.config["label_kind"] == kind
        np.testing.assert_allclose(other.params["head"]["linear"]["bias"], head, rtol=1e-6)


def fold(weights):
    """The weights without BatchNorm, which facebookresearch's format would keep."""
    config = weights.config | {"classifier": weights.config["classifier"] | {"batch_norm": False}}
    return weights._replace(config=config, params=fold_batch_norm(weights.params))


def test_knn_measures_the_kinds_own_score(trained, tmp_path, capsys):
    kind, workdir = trained
    settings = dict(evaluate__random_encoder=False, evaluate__knn_sweep_k=(3,), evaluate__knn_sweep_temperature=(0.1,))
    with one_device():
        result = read_json(run_task("knn", tmp_path, init_from=str(workdir), **settings) / "result.json")
    main = MAIN[kind]
    assert result[f"knn/best_{main}"] == max(row[main] for row in result["sweep"]) >= result[f"knn/{main}"]
    assert {"multi": "mAP, k", "number": "R2, k"}[kind] in capsys.readouterr().out


def test_a_head_for_labels_of_another_kind_is_new_and_one_for_the_same_numbers_gives_the_same(trained):
    kind, workdir = trained
    weights = read_weights(workdir)
    own = make_classifier_config(weights.config["model"], weights.config["classifier"], weights.config)
    other = dataclasses.replace(own, label_kind={"multi": "number", "number": "multi"}[kind])
    settings = ConfigDict({"init_from": str(workdir), "data": weights.config["data"]})
    assert "head" not in starting_params(weights, other)
    assert f"a new head: the checkpoint's has labels of the kind {kind}" in describe_start(weights, other, settings)
    same = starting_params(weights, own)["head"]
    assert same is weights.params["head"] and "with its head" in describe_start(weights, own, settings)
    if kind == "number":  # of data with another mean and standard deviation
        moved = dataclasses.replace(own, number_mean=(1000.0, -5.0), number_std=(7.0, 0.25))
        x = np.random.default_rng(0).standard_normal((20, 16))
        found = x @ starting_params(weights, moved)["head"]["linear"]["kernel"]
        found = (found + starting_params(weights, moved)["head"]["linear"]["bias"]) * [7, 0.25] + [1000, -5]
        expected = (x @ same["linear"]["kernel"] + same["linear"]["bias"]) * own.number_std + np.array(own.number_mean)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_run_that_goes_on_keeps_the_units_of_its_numbers(trained, tmp_path, monkeypatch):
    kind, workdir = trained
    before = read_weights(workdir).config
    workdir = shutil.copytree(workdir, tmp_path / "run")
    monkeypatch.setitem(SIZES, "train", 90)  # the pictures have another mean
    with one_device():
        run_task("linear_probe_digits", workdir, data__name=before["data"]["name"], **SMALL | dict(train__steps=7))
    after = read_weights(workdir).config
    assert (before["num_train_examples"], after["num_train_examples"]) == (96, 90)
    assert [after.get(name) for name in LABEL_FACTS] == [before.get(name) for name in LABEL_FACTS]


def test_data_of_another_kind_than_the_classifiers_are_refused(trained, tmp_path):
    kind, workdir = trained
    message = mistake("evaluate", tmp_path, init_from=str(workdir), data__name="digits")
    assert f"has learned labels of the kind {kind}, but data.name=digits has labels of the kind class" in message
