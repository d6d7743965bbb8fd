"""What the page is told of a picture, against the plain model, NumPy and scikit-learn."""

import base64
import functools
import io
import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.special import expit, softmax
from sklearn.neighbors import NearestNeighbors

from configs import digits
from mae_jax.data.sources import make_source
from mae_jax.interop.weights import make_bind_of, make_processor
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import init_classifier, make_classifier_config
from mae_jax.models.mae import MAEConfig
from mae_jax.runtime.errors import UserError
from mae_jax.tasks.demo.compiled import CompiledModel
from mae_jax.tasks.demo.neighbours import Index
from mae_jax.tasks.demo.viewer import Viewer
from tests.reference import random_like, random_params

NAMES = [f"digit {n}" for n in range(10)]


def make_config(**model):
    config = digits.get_config()
    config.model.update(width=16, depth=2, num_heads=2, decoder_width=16, decoder_depth=1, decoder_num_heads=2)
    config.model.update(attention="xla", remat=False, scan_unroll=1, **model)
    config.data.dtype, config.evaluate.pictures = "uint8", 3
    return config


def make_viewer(config, weights, index=None):
    sources = {"eval": make_source(config.data, "eval", (8, 8), 1)}
    return Viewer(CompiledModel(weights, config), weights, config, sources, index)


@functools.cache
def autoencoder():
    """(viewer, model, params, processor) of random weights with registers."""
    config = make_config(registers=2)
    params = random_params(MAEConfig(**config.model))
    weights = Weights(config.to_dict(), params, 5, "step 5")
    return make_viewer(config, weights), make_bind_of(weights)(params), params, make_processor(config)


def make_classifier(kind, index=None):
    config = make_config()
    config.task, config.classifier.num_classes = "classify", 10
    facts = {"label_kind": kind, "class_names": NAMES}
    params, _ = init_classifier(
        make_classifier_config(config.model.to_dict(), config.classifier.to_dict(), facts), jax.random.key(0)
    )
    weights = Weights(config.to_dict() | facts, random_like(params), 5, "step 5")
    return make_viewer(config, weights, index), make_bind_of(weights)(weights.params), make_processor(config)


def pixels(url):
    """uint8 [h, w, 3] of a data URL."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_the_page_learns_what_the_model_is_and_gets_pictures_with_their_labels():
    viewer = autoencoder()[0]
    about = viewer.about()
    assert about["grid"] == (4, 4) and about["mask_ratio"] == 0.75 and about["reconstructs"] and about["kind"] is None
    assert about["model"] == "2 blocks x 16, 2 heads; 8 x 8 pixels in patches of 2"
    source = make_source(make_config().data, "eval", (8, 8), 1)
    for listed in about["pictures"]:
        item = source[int(listed["name"].partition("#")[2])]
        assert listed["label"] == source.class_names[item["label"]]
        np.testing.assert_array_equal(pixels(listed["image"])[..., 0], np.asarray(item["image"]).reshape(8, 8))


def test_reconstructions_are_the_models_for_every_mask_and_nothing_compiles_again():
    viewer, model, _, processor = autoencoder()
    viewer._compiled.compile()
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    key = viewer.upload(png(picture))["picture"]
    for hidden in ([], [0, 1, 2, 5, 6, 7, 8, 9, 12, 13, 14, 15]):
        mask = np.isin(np.arange(16), hidden)
        found, images = viewer.reconstruct(key, hidden), processor(picture)
        output = model(images, mask=mask)
        expected = np.asarray(model.unpatchify(output.prediction))[0] * 0.376 + 0.305
        expected = np.round(255 * np.clip(expected, 0, 1))
        assert np.abs(pixels(found["prediction"])[..., :1] - expected).max() <= 1
        visible = ~mask.reshape(4, 4).repeat(2, 0).repeat(2, 1)
        pasted = np.where(visible, picture, expected[..., 0])
        assert np.abs(pixels(found["pasted"])[..., 0] - pasted).max() <= 1
        assert found["loss"] == (pytest.approx(float(output.loss), rel=1e-4) if hidden else None)
    assert viewer._compiled._reconstruct_fn._cache_size() == viewer._compiled._look_fn._cache_size() == 1


def test_attention_is_the_softmax_of_the_last_blocks_queries_and_keys():
    viewer, model, params, processor = autoencoder()
    picture = np.random.default_rng(1).integers(0, 256, (8, 8), np.uint8)
    key = viewer.upload(png(picture))["picture"]
    x = np.asarray(model.encode(processor(picture), output_hidden_states=True).hidden_states[-2][0], np.float64)
    block = jax.tree.map(lambda leaf: np.asarray(leaf[-1], np.float64), params["encoder"]["blocks"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * block["norm1"]["scale"] + block["norm1"]["bias"]
    kernel, bias = block["attention"]["qkv"]["kernel"], block["attention"]["qkv"]["bias"]
    q, k = ((x @ kernel[:, part] + bias[part]).reshape(-1, 2, 8) for part in range(2))
    weights = softmax(np.einsum("qhd,khd->hqk", q, k) / np.sqrt(8), axis=-1)  # of the class token, 2 registers, patches
    for patch, row in ((None, 0), (0, 3), (15, 18)):
        found = viewer.attention(key, patch)
        np.testing.assert_allclose(found["heads"], weights[:, row, 3:], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found["mean"], weights[:, row, 3:].mean(axis=0), rtol=0, atol=1e-5)
        assert found["others"] == pytest.approx(weights[:, row, :3].sum(axis=1).mean(), abs=1e-5)


@pytest.mark.parametrize("kind", ["class", "multi", "number"])
def test_predictions_are_the_classifiers_by_name_with_probabilities_or_values(kind):
    viewer, model, processor = make_classifier(kind)
    picture = np.random.default_rng(2).integers(0, 256, (8, 8), np.uint8)
    outputs = np.asarray(model(processor(picture)), np.float64)[0]
    values = {"class": softmax, "multi": expit, "number": np.asarray}[kind](outputs)
    order = np.arange(10) if kind == "number" else np.argsort(values)[::-1]
    found = viewer.upload(png(picture))["predictions"]
    assert [row["name"] for row in found] == [NAMES[n] for n in order[:5]]
    np.testing.assert_allclose([row["value"] for row in found], values[order[:5]], rtol=1e-4)
    with pytest.raises(UserError, match="no decoder"):
        viewer.reconstruct("upload 1", [])


ABOUT = {"init_from": "runs/digits", "step": 5, "token": "mean", "layer": None, "image_size": [8, 8]}


def write_index(folder, vectors, files, labels, **about):
    """A table as configs/features.py writes it, without its code."""
    folder.mkdir()
    told = [NAMES[label] for label in labels]
    columns = {"file": files, "split": ["eval"] * len(files), "label": pa.array(told, pa.string())}
    columns["index"] = pa.array(range(len(files)), pa.int64())
    columns["vector"] = pa.array([row.tolist() for row in vectors], pa.list_(pa.float32(), 16))
    facts = {"label_kind": "class", "class_names": NAMES, "shape": [16]}
    metadata = {"mae_jax": json.dumps(ABOUT | facts | about)}
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), folder / "features.parquet")
    return str(folder)


def test_neighbours_are_those_of_scikit_learn_with_pictures_from_their_files_or_the_data(tmp_path):
    vectors, source = np.random.default_rng(3).normal(size=(40, 16)).astype(np.float32), digits_source()
    files = [str(tmp_path / f"{n}.png") if n % 4 else source.name_of(n) for n in range(40)]
    for n in range(0, 40, 2):  # of the others some are in the data, some are gone
        if n % 4:
            Image.fromarray(np.full((8, 8), n, np.uint8)).save(files[n])
    index = Index(write_index(tmp_path / "index", vectors, files, [n % 10 for n in range(40)]), ABOUT)
    viewer, model, processor = make_classifier("class", index)
    picture = np.random.default_rng(4).integers(0, 256, (8, 8), np.uint8)
    feature = np.asarray(model.encode(processor(picture)))[:, 1:].mean(axis=1)
    distances, rows = NearestNeighbors(metric="cosine").fit(vectors).kneighbors(feature, 8)
    found = viewer.upload(png(picture))["neighbours"]
    assert [row["name"] for row in found] == [files[n].split("/")[-1] for n in rows[0]]
    assert [row["label"] for row in found] == [NAMES[n % 10] for n in rows[0]]
    np.testing.assert_allclose([row["cosine"] for row in found], 1 - distances[0], atol=1e-5)
    assert {n % 4 for n in rows[0]} == {0, 1, 2, 3}
    for n, row in zip(rows[0], found, strict=True):
        assert ("image" in row) == (n % 2 == 0)
        if n % 2 == 0:
            expected = np.full((8, 8), n) if n % 4 else np.asarray(source[n]["image"]).reshape(8, 8)
            np.testing.assert_array_equal(pixels(row["image"])[..., 0], expected)


def digits_source():
    return make_source(make_config().data, "eval", (8, 8), 1)


def test_an_index_that_is_missing_or_of_another_encoder_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=f"demo.index={tmp_path}: .* is no table of features") as error:
        Index(str(tmp_path), ABOUT)
    assert "\n" not in str(error.value)
    (tmp_path / "features.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="is no table of features"):
        Index(str(tmp_path), ABOUT)
    with pytest.raises(UserError, match="has no pictures"):
        Index(write_index(tmp_path / "empty", np.ones((0, 16)), [], []), ABOUT)
    for name, value in {"layer": 2, "token": "class", "step": 7, "init_from": "runs/others"}.items():
        folder = write_index(tmp_path / name, np.ones((2, 16)), ["a", "b"], [0, 1], **{name: value})
        with pytest.raises(UserError, match=f"has features of another encoder .{name}={value}"):
            Index(folder, ABOUT)


@pytest.mark.parametrize(
    "question, arguments, text",
    [
        ("upload", [b""], "the file is empty"),
        ("upload", [b"no picture"], "the file cannot be used"),
        ("upload", [png(np.zeros((40, 40, 3), np.uint8))[:60]], "the file cannot be used"),
        ("open", [3], "there are 3 to choose from"),
        ("open", [True], "there are 3 to choose from"),
        ("reconstruct", ["upload 1", [16]], "from 0 to 15"),
        ("reconstruct", ["upload 1", "all"], "from 0 to 15"),
        ("reconstruct", ["upload 1", list(range(16))], "at least one patch must stay visible"),
        ("reconstruct", ["upload 999", [1]], "no longer kept"),
        ("attention", [["a"], 1], "no longer kept"),
        ("attention", ["upload 1", 16], "from 0 to 15"),
        ("attention", ["upload 1", 1.5], "from 0 to 15"),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_line(question, arguments, text):
    with pytest.raises(UserError, match=text) as error:
        getattr(autoencoder()[0], question)(*arguments)
    assert "\n" not in str(error.value)


def test_bands_of_any_values_are_stretched_and_pixels_without_data_have_one_colour():
    config = make_config(channels=5)
    config.data.update(dtype="float32", mean=(100.0,), std=(50.0,))
    weights = Weights(config.to_dict(), random_params(MAEConfig(**config.model)), 5, "step 5")
    viewer = Viewer(CompiledModel(weights, config), weights, config, {}, None)
    picture, file = np.random.default_rng(5).uniform(0, 200, (8, 8, 5)).astype(np.float32), io.BytesIO()
    picture[:2, :2] = np.nan
    np.save(file, picture)
    opened = viewer.upload(file.getvalue())
    found = viewer.reconstruct(opened["picture"], [15])
    assert viewer.about()["pictures"] == [] and opened["note"].startswith("channels 0, 1, 2 as red, green, blue")
    low, high = np.nanpercentile(picture[..., :3], (2, 98), axis=(0, 1))
    expected = np.round(255 * np.clip((picture[..., :3] - low) / (high - low), 0, 1))
    expected[:2, :2] = round(255 * 0.85)
    assert np.abs(pixels(opened["image"]) - expected).max() <= 1
    assert np.abs(pixels(found["pasted"])[:6] - expected[:6]).max() <= 1
