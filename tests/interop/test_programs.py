"""Exported programs give the model's outputs: in onnxruntime, and in JAX without this package."""

import json
import sys

import jax
import numpy as np
import onnx
import pytest
import sklearn.datasets
from PIL import Image, ImageOps

import mae_jax
from mae_jax.data.augment import normalize
from mae_jax.interop.formats import PROGRAMS, export, fit
from mae_jax.interop.programs import picture_processor
from mae_jax.interop.weights import make_bind_of, make_processor
from mae_jax.models.targets import TARGETS, Target
from mae_jax.runtime.errors import UserError
from tests.interop.others import our_classifier, our_weights
from tests.reference import max_relative, random_batch

onnxruntime = pytest.importorskip("onnxruntime")

TOLERANCE = 1e-5  # of the largest value; the promise is 1e-4


def run_program(file, *inputs):
    """The outputs of a program, as a list."""
    if file.suffix == ".onnx":
        session = onnxruntime.InferenceSession(file)
        names = [found.name for found in session.get_inputs()]
        return session.run(None, dict(zip(names, inputs, strict=True)))
    return jax.tree.leaves(jax.export.deserialize(file.read_bytes()).call(*inputs))


def with_data(weights, **data):
    return weights._replace(config=weights.config | {"data": weights.config["data"] | data})


def outputs_of(weights, images, noise=None):
    """What the model itself gives, by program."""
    bind = make_bind_of(weights)

    @jax.jit
    def run(params, images, noise):
        model = bind(params)
        found = {"encoder": [model.encode(images)]}
        if "head" in params:
            return found | {"classifier": [model(images)]}
        if "decoder" not in params:
            return found
        output = model(images, noise=noise)
        return found | {"reconstruction": [output.prediction, output.mask]}

    return run(weights.params, images, noise)


def check_programs(weights, folder, format, pictures, images, counts=(3,), **options):
    """Fails unless all programs give the model's outputs for these numbers of pictures."""
    noise = np.random.default_rng(1).random((3, 16), np.float32)
    noise[:, 3] = noise[:, 9]  # of equal values, the earlier patch stays visible
    files = [file for file in export(weights, folder, format, **options) if file.suffix != ".json"]
    expected = outputs_of(fit(weights, format, **options), images, noise)
    assert {file.stem for file in files} == set(expected)
    for file in files:
        for count in counts:
            inputs = [pictures[:count]] + [noise[:count]] * (file.stem == "reconstruction")
            found = run_program(file, *inputs)
            for a, b in zip(found, expected[file.stem], strict=True):
                limit = TOLERANCE * float(np.max(np.abs(b)) or 1)  # a mask that hides nothing is 0
                np.testing.assert_allclose(a, b[:count], rtol=0, atol=limit, err_msg=file.name)


AUTOENCODERS = {
    "plain": dict(mask_cell=2),  # which noise does not know
    "all_visible": dict(mask_ratio=0.0),
    "rectangle": dict(image_size=(10, 40), positions="learned"),
    "tokens": dict(class_tokens=3, registers=2, qk_norm=True, activation="mish"),
    "cross": dict(decoder_attention="cross", class_tokens=2, qkv_bias=False, activation="gelu_tanh"),
    "mask_tokens": dict(encoder_mask_tokens=True, activation="quick_gelu"),
    "components": dict(pca_targets=5, normalize_targets=False, activation="leaky_relu"),
}


@pytest.mark.parametrize(
    "format, name", [("onnx", name) for name in AUTOENCODERS] + [("stablehlo", "plain"), ("stablehlo", "tokens")]
)
def test_programs_of_an_autoencoder_give_its_features_predictions_and_masks(tmp_path, format, name):
    weights = our_weights(**AUTOENCODERS[name])
    height, width = weights.config["model"]["image_size"]
    pictures = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
    mean, std = (np.array(weights.config["data"][name]) for name in ("mean", "std"))
    check_programs(weights, tmp_path, format, pictures, np.float32((pictures / 255 - mean) / std), counts=(3, 1))


@pytest.mark.parametrize(
    "format, pool, batch_norm",
    [("onnx", "mean_norm", True), ("onnx", "class", False), ("onnx", "mean", True), ("onnx", "attentive", True)]
    + [("onnx", "abmilp", False)]
    + [("stablehlo", "attentive", True)],
)
def test_programs_of_a_classifier_give_its_features_and_logits(tmp_path, format, pool, batch_norm):
    weights = our_classifier(pool, batch_norm, class_tokens=2 if pool == "class" else 1)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    check_programs(weights, tmp_path, format, pictures, normalize(pictures, picture_processor(weights)))


@pytest.mark.parametrize("activation", ["silu", "relu", "relu6", "sigmoid", "tanh"])
def test_every_activation_can_be_written_as_onnx(tmp_path, activation):
    weights = our_classifier("mean", activation=activation, depth=1)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    check_programs(weights, tmp_path, "onnx", pictures, normalize(pictures, picture_processor(weights)))


def test_numbers_leave_a_program_in_the_units_of_the_labels(tmp_path):
    weights = our_classifier("mean_norm", classes=2)
    facts = {"label_kind": "number", "number_mean": (40.0, -3.0), "number_std": (9.0, 0.5)}
    weights = weights._replace(config=weights.config | facts)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    images = normalize(pictures, picture_processor(weights))
    check_programs(weights, tmp_path / "onnx", "onnx", pictures, images)
    about = json.loads((tmp_path / "onnx" / "about.json").read_text())
    assert about["label_kind"] == "number" and "numbers" in about["programs"]["classifier"]["outputs"]


@pytest.mark.parametrize(
    "format, data, dtype",
    [
        ("onnx", dict(value_range=(-9, 4095), dtype="int16"), "int16"),
        ("onnx", dict(value_range=(0, 4095)), "float32"),  # of any type
        ("onnx", dict(dtype="float32", mean=(900.0, 80.0, -7.0), std=(300.0,), bands=(4, 0, 2)), "float32"),
        ("stablehlo", dict(value_range=(0, 4095), dtype="float32", bands=(4, 0, 2)), "float32"),
    ],
)
def test_a_program_scales_clips_and_fills_deep_pictures_as_the_processor_does(tmp_path, format, data, dtype):
    weights = with_data(our_weights(depth=1), eval_crop=1.0, **data)
    pictures = np.random.default_rng(0).normal(1000, 3000, (3, 20, 20, 3)).clip(-2000, 5000).astype(dtype)
    if "dtype" in data and dtype == "float32":
        pictures[:, 5:9, :, 1] = np.nan  # no data
    own = make_processor(with_data(weights, bands=None).config)
    check_programs(weights, tmp_path, format, pictures, own(pictures), encoder_only=True)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["pictures"]["dtype"] == dtype and about["pictures"]["bands"] == (list(data.get("bands", [])) or None)


# --------------------------------------------------------------------------------------------- photographs, as users do


def prepared(picture, about):
    """A photograph as the text in about.json says, in Pillow alone."""
    (h, w), (height, width) = about["pictures"]["resize_to_cover"], about["pictures"]["crop"]
    size = max(w, picture.width * h // picture.height), max(h, picture.height * w // picture.width)
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    picture = ImageOps.exif_transpose(picture).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return np.asarray(picture.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("size", [(20, 20), (10, 40)])
def test_photographs_through_the_exported_preprocessing_alone_give_the_models_outputs(tmp_path, size):
    weights = our_classifier("mean_norm", image_size=size)
    photographs = [Image.fromarray(array) for array in sklearn.datasets.load_sample_images().images]
    photographs.append(photographs[0].crop((0, 0, 201, 399)))
    expected = outputs_of(weights, make_processor(weights.config)(photographs))["classifier"][0]
    for format in PROGRAMS:
        export(weights, tmp_path, format)
        about = json.loads((tmp_path / "about.json").read_text())
        assert about["class_names"] == [f"kind {n}" for n in range(7)]
        pictures = np.stack([prepared(photograph, about) for photograph in photographs])
        (found,) = run_program(tmp_path / about["programs"]["classifier"]["file"], pictures)
        assert max_relative(found, expected) < TOLERANCE


def test_an_onnx_file_says_in_its_metadata_what_about_json_says(tmp_path):
    export(our_classifier("class"), tmp_path, "onnx")
    about = json.loads((tmp_path / "about.json").read_text())
    found = {entry.key: entry.value for entry in onnx.load(tmp_path / "classifier.onnx").metadata_props}
    for key in ("pictures", "normalisation", "class_names", "label_kind", "step"):
        assert (json.loads(found[key]) if key != "label_kind" else found[key]) == about[key]
    assert about["normalisation"]["mean"] == [0.3, 0.4, 0.5] and about["pictures"]["resize_to_cover"] == [22, 22]


def test_an_onnx_file_passes_the_full_check_and_has_the_operators_of_opset_17_alone(tmp_path):
    for file in export(our_weights(), tmp_path, "onnx")[:2]:
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        kinds = {node.op_type for node in model.graph.node}
        assert {"Erf", "LayerNormalization"} <= kinds


def test_a_stablehlo_file_is_for_three_platforms_and_float32_to_the_last_bit_of_a_product(tmp_path):
    for file in export(our_weights(), tmp_path, "stablehlo")[:2]:
        exported = jax.export.deserialize(file.read_bytes())
        assert exported.platforms == ("cpu", "cuda", "tpu") and str(exported.in_avals[0].shape[0]) == "batch"
        text = exported.mlir_module()
        assert "bf16" not in text and "precision = [DEFAULT" not in text


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("format, package", [("onnx", "onnx"), ("stablehlo", "flatbuffers")])
def test_a_missing_package_is_named_and_nothing_is_written(tmp_path, monkeypatch, format, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"format={format} needs another package: pip install {package}"):
        export(our_weights(), tmp_path / "export", format)
    assert not (tmp_path / "export").exists()


def test_onnx_refuses_a_target_of_ones_own_but_not_its_encoder(tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "own", Target)
    weights = our_weights(target="own")
    with pytest.raises(UserError, match="format=onnx has no model.target=own: export format=stablehlo, or the encoder"):
        fit(weights, "onnx")
    assert [file.name for file in export(weights, tmp_path, "onnx", encoder_only=True)] == [
        "encoder.onnx",
        "about.json",
    ]


def test_weights_that_do_not_fit_into_a_file_are_refused(monkeypatch):
    weights = our_weights()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights.params["encoder"])) + 4 * 17 * (24 + 16)
    for limit, remedy in ((size, "export the encoder: --config.encoder_only=True"), (99, "export format=hugging")):
        monkeypatch.setattr("mae_jax.interop.programs.MOST_BYTES", limit)
        with pytest.raises(UserError, match=remedy):
            fit(weights, "onnx")


def test_a_loaded_classifier_has_its_class_names(tmp_path):
    for format in ("huggingface", "facebook", "timm"):
        export(our_classifier("class"), tmp_path / format, format)
        model = mae_jax.load(tmp_path / format)
        assert model.class_names == tuple(f"kind {n}" for n in range(7))
        images, _ = random_batch(model.config.encoder, 1)
        assert jax.jit(lambda model, images: model(images))(model, images).shape == (1, 7)
