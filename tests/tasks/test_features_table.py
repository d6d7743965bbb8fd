"""The task features: a table of vectors with the pictures' names and labels."""

import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import mae_jax
from mae_jax.evaluation.feature_table import read_features
from mae_jax.runtime.errors import UserError
from tests.digit_files import write_digits
from tests.label_sources import Several
from tests.runs import mistake, one_device, read_json, run_task

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 digits in class folders of two splits, one bad file."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(root, 40, lambda n, digit: f"{'train' if n < 30 else 'val'}/class {digit % 2}")
    (root / "train/class 0/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    return root


def features_of(pretrained, workdir, **settings):
    settings = dict(init_from=str(pretrained), data__name="image_folder") | settings
    return read_features(run_task("features", workdir, **settings))


def test_rows_are_the_encoders_features_with_names_splits_and_labels(pretrained, folder, tmp_path):
    found = features_of(pretrained, tmp_path, data__path=str(folder), evaluate__batch_size=16)
    assert len(found.files) == 40 and found.splits == ["train"] * 30 + ["eval"] * 10
    assert found.about["class_names"] == ["class 0", "class 1"] and found.about["shape"] == [16]
    assert [f"class {label}" for label in found.labels] == [file.split("/")[-2] for file in found.files]
    model = mae_jax.load(pretrained)
    expected = model.encode(model.processor(found.files))[:, 1:].mean(axis=1)
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    (bad,) = read_json(tmp_path / "result.json")["left_out"]
    assert bad["file"].endswith("damaged.png") and bad["split"] == "train" and bad["error"]


@pytest.mark.parametrize("layer", [1, -1])
def test_any_blocks_class_token_and_patches_are_written(layer, pretrained, folder, tmp_path):
    model = mae_jax.load(pretrained)
    with one_device():
        for token in ("class", "patches"):
            found = features_of(pretrained, tmp_path / token, data__path=str(folder / "val"), evaluate__token=token,
                                evaluate__layer=layer)  # fmt: skip
            images = model.processor(found.files)
            states = model.encode(images, output_hidden_states=True).hidden_states
            tokens = np.asarray(model.encoder.norm(states[layer]))
            expected = tokens[:, 0] if token == "class" else tokens[:, 1:].reshape(len(tokens), -1)
            np.testing.assert_allclose(found.vectors, expected, atol=1e-5)


def test_a_flat_folder_is_taken_whole_and_each_size_has_a_table(pretrained, folder, tmp_path):
    (tmp_path / "flat").mkdir()
    for file in (folder / "val").rglob("*.png"):
        shutil.copy(file, tmp_path / "flat")
    with one_device():
        run_task("features", tmp_path / "run", init_from=str(pretrained), data__name="image_folder",
                 data__path=str(tmp_path / "flat"), features__image_sizes=(8, (8, 12)))  # fmt: skip
    small, wide = (read_features(tmp_path / "run" / f"features_{size}.parquet") for size in ("8", "8x12"))
    assert small.splits == ["eval"] * 10 and small.labels.tolist() == [-1] * 10 and small.about["class_names"] is None
    model = mae_jax.load(pretrained, image_size=(8, 12))
    expected = model.encode(model.processor(wide.files))[:, 1:].mean(axis=1)
    np.testing.assert_allclose(wide.vectors, expected, atol=1e-5)
    assert np.abs(small.vectors - wide.vectors).max() > 1e-3


def test_classes_are_those_of_training_if_only_that_has_folders_of_them(pretrained, folder, tmp_path):
    (tmp_path / "data/val").mkdir(parents=True)
    shutil.copytree(folder / "train", tmp_path / "data/train")
    for file in (folder / "val").rglob("*.png"):
        shutil.copy(file, tmp_path / "data/val")
    with one_device():
        found = features_of(pretrained, tmp_path / "run", data__path=str(tmp_path / "data"))
    assert found.about["class_names"] == ["class 0", "class 1"]
    assert found.labels[30:].tolist() == [-1] * 10 and set(found.labels[:30]) == {0, 1}


def test_a_tables_files_are_written_as_they_can_be_opened(pretrained, folder, tmp_path):
    files = sorted(map(str, (folder / "val").rglob("*.png")))
    (tmp_path / "table.csv").write_text("file\n" + "\n".join(files))
    settings = dict(data__name="table", data__path=str(tmp_path / "table.csv"))
    with one_device():
        found = features_of(pretrained, tmp_path / "run", **settings)
    assert sorted(found.files) == files


def test_several_labels_come_back(pretrained, tmp_path):
    with one_device():
        found = features_of(pretrained, tmp_path, data__name="tests.label_sources:Several")
    labels = np.concatenate([Several(split).labels() for split in ("train", "eval")])
    np.testing.assert_array_equal(found.labels, labels)
    assert found.about["label_kind"] == "multi"


def test_other_tables_and_blocks_that_are_not_there_are_refused(pretrained, tmp_path):
    pq.write_table(__import__("pyarrow").table({"a": [1]}), tmp_path / "features.parquet")
    for path in (tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(UserError, match="is no table of features.*configs/features.py"):
            read_features(path)
    settings = dict(init_from=str(pretrained))
    assert "the encoder has the blocks 1 to 2" in mistake("features", tmp_path / "a", evaluate__layer=3, **settings)
    assert "patches is for the task features" in mistake("knn", tmp_path / "b", evaluate__token="patches", **settings)


def test_the_digits_features_are_those_of_the_arrays(pretrained, tmp_path):
    with one_device():
        found = features_of(pretrained, tmp_path / "table", data__name="digits")
        arrays = run_task("features", tmp_path / "arrays", init_from=str(pretrained), features__format="npy")
    stacked = np.concatenate([np.load(arrays / f"{split}_features.npy") for split in ("train", "eval")])
    np.testing.assert_allclose(found.vectors, stacked, atol=1e-6)
    assert jax.device_count() == 8 and found.files[0].endswith("#0")
