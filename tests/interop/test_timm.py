"""Files as timm writes them, made by renaming models of transformers, and by timm itself where it is installed."""

import json

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.interop.formats import export
from mae_jax.interop.weights import make_bind_of, read_weights
from mae_jax.runtime.errors import UserError
from tests.interop.others import (
    BEIT,
    ENCODER,
    create,
    our_classifier,
    our_weights,
    pictures,
    run,
    save_safetensors,
    state_of,
    to_facebook,
)
from tests.reference import max_relative

pytestmark = pytest.mark.filterwarnings("ignore:.*(assumed|left over|no decoder)")

# About two hundred roundings of float32; orders of summation and erf differ, which makes about twenty (2e-6).
TOLERANCE = 2e-5
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def timm_config(pool, **arguments):
    """A config.json with timm's keys, for ENCODER."""
    return {
        "architecture": "vit_base_patch16_224", "num_classes": 7, "num_features": 24, "global_pool": pool,
        "label_names": CLASSES,
        "model_args": {"img_size": [20, 20], "patch_size": 5, "embed_dim": 24, "num_heads": 12, **arguments},
        "pretrained_cfg": {
            "tag": "mae", "input_size": [3, 20, 20], "crop_pct": 0.9, "interpolation": "bicubic",
            "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_classes": 7, "classifier": "head",
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "architecture, settings, pool, arguments",
    [
        ("ViTForImageClassification", {}, ("class", "token"), {}),
        ("BeitForImageClassification", BEIT, ("mean_norm", "avg"), {}),
        ("BeitForImageClassification", BEIT, ("mean_norm", "avg"), {"fc_norm": True, "global_pool": "avg"}),
    ],
)
def test_a_folder_gives_the_logits_of_transformers(tmp_path, architecture, settings, pool, arguments):
    theirs = create(architecture, **ENCODER, **settings, num_labels=7)
    images = pictures(theirs)
    save_safetensors(tmp_path / "model.safetensors", to_facebook(state_of(theirs)), timm_config(pool[1], **arguments))
    ours = mae_jax.load(tmp_path)
    assert ours.config.pool == pool[0]
    assert max_relative(jax.jit(ours.__call__)(images), run(theirs, images).logits) < TOLERANCE


def test_the_mean_of_normed_tokens_is_the_pool_of_avg_without_fc_norm(tmp_path):
    theirs, rng = create("ViTModel", **ENCODER), np.random.default_rng(3)
    kernel, bias = rng.standard_normal((7, 24), np.float32), rng.standard_normal(7, np.float32)
    images, state = pictures(theirs), to_facebook(state_of(theirs)) | {"head.weight": kernel, "head.bias": bias}
    state = {name: value for name, value in state.items() if "pooler" not in name}
    expected = run(theirs, images).last_hidden_state.numpy()[:, 1:].mean(1) @ kernel.T + bias
    config = timm_config("avg", fc_norm=False)
    ours = mae_jax.load(save_safetensors(tmp_path / "model.safetensors", state, config).parent)
    assert ours.config.pool == "mean"
    assert max_relative(jax.jit(ours.__call__)(images), expected) < TOLERANCE


def test_settings_pictures_and_names_of_classes_are_those_of_the_config_json(tmp_path):
    state = to_facebook(state_of(create("ViTForImageClassification", **ENCODER, num_labels=7)))
    config = timm_config("token", act_layer="quick_gelu", img_size=[10, 40])
    weights = read_weights(save_safetensors(tmp_path / "model.safetensors", state, config))
    expected = dict(
        image_size=(10, 40), patch_size=5, channels=3, width=24, depth=2, num_heads=12, mlp_width=40, qkv_bias=True,
        activation="quick_gelu", norm_epsilon=1e-6, positions="learned",
    )  # fmt: skip
    assert {name: weights.config["model"][name] for name in expected} == expected
    assert weights.config["class_names"] == CLASSES and weights.notes == ()
    assert {name: weights.config["data"][name] for name in ("mean", "std", "eval_crop")} == {
        "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "eval_crop": 0.9
    }  # fmt: skip


def test_a_bare_file_loads_with_heads_that_are_asked_for_and_the_class_token_as_pool(tmp_path):
    theirs = create("ViTForImageClassification", **ENCODER, num_labels=7)
    path, images = save_safetensors(tmp_path / "vit.safetensors", to_facebook(state_of(theirs))), pictures(theirs)
    with pytest.raises(UserError, match="num_heads"):
        mae_jax.load(path)
    ours = mae_jax.load(path, num_heads=12)
    assert max_relative(jax.jit(ours.__call__)(images), run(theirs, images).logits) < TOLERANCE


def test_a_pool_without_a_counterpart_is_refused_in_one_line(tmp_path):
    state = to_facebook(state_of(create("ViTForImageClassification", **ENCODER, num_labels=7)))
    path = save_safetensors(tmp_path / "model.safetensors", state, timm_config("map"))
    with pytest.raises(UserError, match="global_pool='map'") as error:
        mae_jax.load(path)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- timm itself


@pytest.mark.parametrize(
    "pool, batch_norm, model",
    [
        ("class", True, {}),
        ("mean", False, {"activation": "relu", "qkv_bias": False}),
        ("mean_norm", False, {"image_size": (10, 20), "mlp_width": 41, "activation": "quick_gelu"}),
        (None, False, {"positions": "learned", "activation": "gelu_tanh"}),
    ],
)
def test_timm_loads_what_we_export_and_gives_the_same_numbers(tmp_path, pool, batch_norm, model):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    weights = our_classifier(pool, batch_norm, **model) if pool else our_weights(**model)
    export(weights, tmp_path, "timm", encoder_only=pool is None)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    size = weights.config["model"]["image_size"]
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        x = torch.tensor(images.transpose(0, 3, 1, 2).copy())
        expected = theirs(x) if pool else theirs.forward_features(x)
    ours = make_bind_of(weights)(jax.device_put(weights.params))
    assert max_relative(jax.jit(ours.__call__ if pool else ours.encode)(images), expected) < TOLERANCE
    if pool:
        data = timm.data.resolve_model_data_config(theirs)
        assert (*data["mean"], *data["std"], data["crop_pct"]) == (0.3, 0.4, 0.5, 0.2, 0.25, 0.3, 0.9)


@pytest.mark.parametrize("pool, fc_norm", [("token", None), ("avg", False), ("avg", None)])
def test_we_load_what_timm_saves_and_give_the_same_numbers(tmp_path, pool, fc_norm):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    arguments = dict(
        img_size=(8, 12), patch_size=4, embed_dim=24, depth=2, num_heads=3, in_chans=1, global_pool=pool,
        fc_norm=fc_norm,
    )  # fmt: skip
    theirs = timm.create_model("vit_base_patch16_224", **arguments, num_classes=5).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    timm.models.save_for_hf(theirs, tmp_path, model_args=arguments, safe_serialization=True)
    images = np.random.default_rng(0).standard_normal((2, 8, 12, 1)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2).copy()))
    ours = mae_jax.load(tmp_path)
    assert max_relative(jax.jit(ours.__call__)(images), expected) < TOLERANCE
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["mean"] == list(ours.processor.mean)
