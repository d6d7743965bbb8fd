"""What is exported comes back to the last bit, and transformers gives the same numbers with it."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import mae_jax
from mae_jax.interop.formats import WEIGHTS, export, fit, fold_batch_norm
from mae_jax.interop.huggingface import from_state
from mae_jax.interop.torch_layout import write_state
from mae_jax.interop.weights import make_bind_of, read_weights
from mae_jax.models.config import SIZES
from mae_jax.models.mae import MAEConfig, init_params
from mae_jax.models.masking import masks_from_noise
from mae_jax.models.parameters import count_parameters
from mae_jax.runtime.errors import UserError
from tests.interop.others import (
    AUTOENCODER,
    check_same_params,
    create,
    facebook_state,
    our_classifier,
    our_weights,
    respelled,
    run,
    save_safetensors,
    state_of,
)
from tests.reference import max_relative

pytestmark = pytest.mark.filterwarnings("ignore:.*(mean and std|left over|no decoder)")

# About two hundred roundings of float32; orders of summation and erf differ, which makes about twenty (2e-6).
TOLERANCE = 2e-5


def needs(format):
    if format == "facebook":
        pytest.importorskip("torch")


def written(weights, folder, format, **options):
    """What is read of what was exported."""
    needs(format)
    export(weights, folder, format, **options)
    return read_weights(folder)


def check_same(found, expected):
    """Fails unless two models are the same: parameters to the last bit, settings, pictures, classes and step."""
    check_same_params(found.params, expected.params)
    ours, theirs = (MAEConfig(**weights.config["model"]) for weights in (found, expected))
    if "decoder" in expected.params:
        assert ours == theirs
    else:  # a file without a decoder says nothing of one
        assert (ours.blocks, ours.image_size, ours.grid) == (theirs.blocks, theirs.image_size, theirs.grid)
        assert (ours.channels, ours.dtype) == (theirs.channels, theirs.dtype)
    assert found.config["task"] == expected.config["task"]
    for name in ("mean", "std", "eval_crop"):
        assert found.config["data"].get(name) == expected.config["data"].get(name)
    if "classifier" in expected.config:
        assert tuple(found.config["class_names"]) == tuple(expected.config["class_names"])
        for name in ("num_classes", "pool", "batch_norm"):
            assert found.config["classifier"][name] == expected.config["classifier"][name]
    assert found.step == expected.step


def bound(weights):
    """The model of weights."""
    return make_bind_of(weights)(jax.device_put(weights.params))


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("format", ["huggingface", "facebook"])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_an_autoencoder_comes_back_to_the_last_bit(tmp_path, format, positions):
    weights = our_weights(positions=positions)
    check_same(written(weights, tmp_path, format), weights)


@pytest.mark.parametrize("format", WEIGHTS)
def test_an_encoder_comes_back_to_the_last_bit(tmp_path, format):
    weights = our_weights(positions="learned")
    found = written(weights, tmp_path, format, encoder_only=True)
    check_same_params(found.params, {"encoder": weights.params["encoder"]})
    again = written(found, tmp_path / "again", format)
    check_same(again, found)
    assert MAEConfig(**found.config["model"]).blocks == MAEConfig(**weights.config["model"]).blocks


@pytest.mark.parametrize("format", WEIGHTS)
def test_an_encoder_with_fixed_positions_comes_back_with_fixed_positions(tmp_path, format):
    weights = our_weights()
    found = written(weights, tmp_path, format, encoder_only=True)
    check_same_params(found.params, {"encoder": weights.params["encoder"]})
    assert found.config["model"]["positions"] == "sincos"


@pytest.mark.parametrize(
    "format, pool",
    [(format, pool) for format in WEIGHTS for pool in ("class", "mean_norm")] + [("timm", "mean")],
)
def test_a_classifier_comes_back_to_the_last_bit(tmp_path, format, pool):
    weights = our_classifier(pool)
    found = written(weights, tmp_path, format)
    if (format, pool) == ("huggingface", "mean_norm"):  # BEiT's keys have no bias; a bias of the keys has no influence
        bias = weights.params["encoder"]["blocks"]["attention"]["qkv"]["bias"]
        assert np.any(bias[:, 1])
        bias[:, 1] = 0
    check_same(found, weights._replace(step=found.step) if format == "timm" else weights)  # timm's has no step
    check_same(written(found, tmp_path / "again", format), found)


@pytest.mark.parametrize("pool", ["class", "mean_norm"])
def test_a_linear_probe_comes_back_from_facebooks_format_to_the_last_bit(tmp_path, pool):
    weights = our_classifier(pool, batch_norm=True)
    check_same(written(weights, tmp_path, "facebook"), weights)


def test_settings_that_others_do_not_have_come_back_from_facebooks_format(tmp_path):
    model = dict(
        image_size=(10, 40), activation="quick_gelu", qkv_bias=False, norm_epsilon=1e-3, mask_ratio=0.2, num_heads=6,
        decoder_num_heads=2, normalize_targets=False, dtype="bfloat16", remat=True, mlp_width=None, mlp_ratio=1.3,
        decoder_mlp_width=None,
    )  # fmt: skip
    check_same(written(our_weights(**model), tmp_path, "facebook"), our_weights(**model))


def test_from_format_to_format_no_bit_is_lost(tmp_path):
    pytest.importorskip("torch")
    state = respelled(state_of(create("ViTMAEForPreTraining", **AUTOENCODER)))
    config = AUTOENCODER | {"model_type": "vit_mae"}
    first = read_weights(save_safetensors(tmp_path / "0" / "model.safetensors", state, config).parent)
    facebook = written(first, tmp_path / "1", "facebook")
    check_same_params(facebook.params, first.params)
    back = written(facebook, tmp_path / "2", "huggingface")
    check_same_params(back.params, first.params)
    assert back.config["model"] == first.config["model"]
    tensors = safetensors.numpy.load_file(tmp_path / "2" / "model.safetensors")
    assert tensors.keys() == state.keys()
    for name, values in state.items():
        assert tensors[name].tobytes() == values.tobytes(), name

    encoder = written(facebook, tmp_path / "3", "timm", encoder_only=True)
    check_same_params(encoder.params, {"encoder": first.params["encoder"]})
    for number, format in enumerate(("huggingface", "facebook", "timm")):
        encoder = written(encoder, tmp_path / f"4{number}", format)
        check_same_params(encoder.params, {"encoder": first.params["encoder"]})


def test_what_is_written_has_the_names_and_values_of_facebooks_layout(tmp_path):
    state = facebook_state(classes=0)
    path = save_safetensors(tmp_path / "a" / "model.safetensors", state)
    weights = read_weights(path, dict(num_heads=12, decoder_num_heads=16, normalize_targets=True))
    torch = pytest.importorskip("torch")
    export(weights, tmp_path, "facebook")
    found = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert found.keys() == state.keys()
    for name, values in state.items():
        assert found[name].numpy().tobytes() == values.tobytes() and found[name].shape == values.shape, name


# ------------------------------------------------------------------------------------------------------ transformers


def from_pretrained(architecture, folder, missing=frozenset()):
    """The model that transformers makes of a folder, in which it misses and finds nothing unexpected."""
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert set(info["missing_keys"]) == missing
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info.get("error_msgs")
    assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    return model.eval()


def images_for(weights, batch=3):
    model = weights.config["model"]
    shape = (batch, *model["image_size"], model["channels"])
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"positions": "learned", "activation": "gelu_tanh", "qkv_bias": False, "norm_epsilon": 1e-3},
        {"channels": 1, "normalize_targets": False, "mask_ratio": 0.25, "activation": "silu", "mlp_width": None},
    ],
)
def test_transformers_autoencoder_gives_our_loss_and_predictions(tmp_path, model):
    weights = our_weights(**model)
    weights.config["data"] = weights.config["data"] | ({"mean": (0.3,), "std": (0.2,)} if model.get("channels") else {})
    export(weights, tmp_path, "huggingface")
    theirs = from_pretrained("ViTMAEForPreTraining", tmp_path)
    images, noise = images_for(weights), np.random.default_rng(1).random((3, 16), np.float32)
    expected = run(theirs, images, noise=noise)
    found = jax.jit(bound(weights).__call__)(images, noise=noise)
    assert max_relative(found.loss, expected.loss) < TOLERANCE
    assert max_relative(found.prediction, expected.logits) < TOLERANCE


@pytest.mark.parametrize("size", [(20, 20), (10, 20)])
def test_transformers_vit_gives_the_features_of_our_encoder(tmp_path, size):
    weights = our_weights(image_size=size)
    export(weights, tmp_path, "huggingface", encoder_only=True)
    theirs = from_pretrained("ViTModel", tmp_path, missing={"pooler.dense.weight", "pooler.dense.bias"})
    images = images_for(weights)
    found = jax.jit(bound(weights).encode)(images)
    assert max_relative(found, run(theirs, images).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize(
    "pool, batch_norm, qkv_bias, size",
    [
        ("class", False, True, (20, 20)),
        ("class", True, False, (20, 20)),
        ("class", False, True, (10, 40)),
        ("mean_norm", False, True, (20, 20)),
        ("mean_norm", True, False, (20, 20)),
    ],
)
def test_transformers_classifiers_give_our_logits(tmp_path, pool, batch_norm, qkv_bias, size):
    weights = our_classifier(pool, batch_norm, qkv_bias=qkv_bias, image_size=size)
    export(weights, tmp_path, "huggingface")
    theirs = from_pretrained("ViTForImageClassification" if pool == "class" else "BeitForImageClassification", tmp_path)
    images = images_for(weights)
    found = jax.jit(bound(weights).__call__)(images)
    assert max_relative(found, run(theirs, images).logits) < TOLERANCE
    assert theirs.config.id2label == {n: f"kind {n}" for n in range(7)}
    assert theirs.config.label2id == {f"kind {n}": n for n in range(7)}


def test_batch_norm_is_folded_to_the_last_rounding():
    weights, rng = our_classifier("class", batch_norm=True), np.random.default_rng(0)
    head, x = weights.params["head"], rng.standard_normal((50, 24))
    folded = fold_batch_norm(weights.params)["head"]
    norm, linear = head["batch_norm"], jax.tree.map(np.float64, head["linear"])
    expected = (x - norm["mean"]) / np.sqrt(norm["variance"] + 1e-6) @ linear["kernel"] + linear["bias"]
    # Rounded once to float32: 2^-24 of each of 24 products, on the scale of the largest sum.
    assert max_relative(x @ folded["linear"]["kernel"] + folded["linear"]["bias"], expected) < 1e-6
    assert "batch_norm" in head and "batch_norm" not in folded  # what was given stays as it is


def test_an_export_of_an_autoencoder_has_the_files_of_the_hub(tmp_path):
    files = export(our_weights(), tmp_path, "huggingface")
    assert [file.name for file in files] == ["config.json", "preprocessor_config.json", "model.safetensors"]
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in files}
    model = mae_jax.load(tmp_path)
    assert isinstance(model.processor.mean, tuple)
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "make, format, text",
    [
        (lambda: our_classifier("attentive"), "huggingface", "classifier.pool=attentive"),
        (lambda: our_classifier("attentive"), "facebook", "classifier.pool=attentive"),
        (lambda: our_classifier("attentive"), "timm", "classifier.pool=attentive"),
        (lambda: our_classifier("abmilp"), "timm", "classifier.pool=abmilp"),
        (lambda: our_classifier("mean"), "huggingface", "export format=timm"),
        (lambda: our_classifier("mean_norm", image_size=(10, 40)), "huggingface", "square images only, not 10 x 40"),
        (lambda: our_classifier("mean"), "facebook", "export format=timm"),
        (lambda: our_weights(image_size=(10, 20)), "huggingface", "square images only, not 10 x 20"),
        (lambda: our_classifier("class", norm_epsilon=1e-3), "timm", "norms have epsilon 1e-06, the model's 0.001"),
        (lambda: our_classifier("class", activation="mish"), "timm", "no activation mish"),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path, make, format, text):
    folder = tmp_path / "export"
    with pytest.raises(UserError) as error:
        export(make(), folder, format)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize(
    "make, note",
    [
        (our_weights, "timm's models are encoders: the decoder is left out"),
        (lambda: our_classifier("mean", batch_norm=True), "the BatchNorm before the linear layer is folded into it"),
        (lambda: our_classifier("mean", norm_epsilon=1e-12), "timm's norms have epsilon 1e-06, the model's 1e-12"),
    ],
)
def test_what_timm_cannot_hold_is_changed_and_noted_and_what_was_given_stays_as_it_is(tmp_path, make, note):
    weights, before = make(), make()
    fitted = fit(weights, "timm")
    (found,) = fitted.notes
    assert found.startswith(note) and "\n" not in found
    again = fit(fitted, "timm")
    assert not [text for text in again.notes if "epsilon" not in text]
    check_same_params(again.params, fitted.params)
    check_same_params(written(weights, tmp_path, "timm").params, fitted.params)
    check_same_params(weights.params, before.params)
    assert weights.config == before.config


@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize(
    "settings, step",
    [
        (
            {"value_range": (-9, 4095)},
            "scaled to [0, 255] by data.value_range=(-9, 4095) and clipped; it divides them by 255",
        ),
        ({"dtype": "float32", "mean": (900.0, 80.0, -7.0), "std": (300.0,)}, "the float32 values as they are, not div"),
        ({"bands": (8, 3, 1), "dtype": "uint8"}, "channels 8, 3, 1 of each file, counted from 0 (data.bands)"),
    ],
)
def test_deep_pictures_and_bands_come_back_from_every_format_and_notes_say_what_others_must_do(
    tmp_path, format, settings, step
):
    weights = our_weights()
    weights = weights._replace(config=weights.config | {"data": weights.config["data"] | settings})
    noted = [note for note in fit(weights, format, encoder_only=True).notes if step in note]
    assert len(noted) == (format != "facebook")
    read = written(weights, tmp_path, format, encoder_only=True)
    assert settings.items() <= read.config["data"].items()
    processor = mae_jax.load(tmp_path).processor
    assert {name: getattr(processor, name) for name in settings} == settings
    if format == "huggingface":
        preprocessor = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert preprocessor["do_rescale"] == (settings.get("dtype") != "float32")


@pytest.mark.parametrize("format", WEIGHTS)
def test_the_encoder_of_any_classifier_can_be_exported(tmp_path, format):
    weights = our_classifier("attentive")
    found = written(weights, tmp_path, format, encoder_only=True)
    assert found.config["task"] == "pretrain"
    check_same_params(found.params, {"encoder": weights.params["encoder"]})


# ----------------------------------------------------------------------------------------------------- published facts


@pytest.mark.parametrize(
    "size, full, encoder, facebook_tensors, transformers_tensors",
    [
        ("base", 111_907_840, 85_798_656, 254, 334),
        ("large", 329_541_888, 303_301_632, 398, 526),
        ("huge", 657_074_508, 630_764_800, 494, 654),
    ],
)
def test_the_released_sizes_have_their_numbers_of_parameters_and_tensors(
    size, full, encoder, facebook_tensors, transformers_tensors
):
    config = MAEConfig(**SIZES[size], positions="learned")  # so that the tables are counted
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert (count_parameters(shapes), count_parameters(shapes["encoder"])) == (full, encoder)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    state = write_state(zeros, None, config.patch_size)
    assert len(state) == facebook_tensors
    tensors = from_state(state, "ViTMAEForPreTraining")
    assert len(tensors) == transformers_tensors


@pytest.mark.parametrize("size, heads", [("base", 12), ("large", 16), ("huge", 16)])
def test_names_and_shapes_of_the_released_sizes_are_those_of_transformers(size, heads):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = MAEConfig(**SIZES[size], positions="learned")
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    state = write_state(zeros, None, config.patch_size)
    found = {name: values.shape for name, values in from_state(state, "ViTMAEForPreTraining").items()}
    with torch.device("meta"):
        theirs = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(
                hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=heads,
                intermediate_size=4 * config.width, patch_size=config.patch_size,
            )
        )  # fmt: skip
    assert found == {name: tuple(tensor.shape) for name, tensor in respelled(theirs.state_dict()).items()}
    assert config.num_heads == heads


def test_the_patches_that_transformers_integration_test_keeps_are_those_known():
    np.random.seed(2)
    noise = np.random.uniform(size=(1, 196))
    masks = masks_from_noise(noise.astype(np.float32), 0.75)
    assert masks.ids_keep.shape == (1, 49)
    assert masks.ids_keep[0, :10].tolist() == [188, 126, 77, 189, 81, 1, 55, 151, 147, 91]
