"""Files as facebookresearch/mae writes them, made by renaming models of transformers: the same numbers."""

import argparse

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.interop.weights import read_weights
from mae_jax.runtime.errors import UserError
from tests.interop.others import (
    AUTOENCODER,
    BEIT,
    ENCODER,
    check_same_params,
    create,
    facebook_state,
    in_order,
    pictures,
    run,
    save_torch,
    state_of,
    to_facebook,
)
from tests.reference import max_relative

pytestmark = pytest.mark.filterwarnings("ignore:.*(assumed|left over|no decoder)")

# About two hundred roundings of float32; orders of summation and erf differ, which makes about twenty (2e-6).
TOLERANCE = 2e-5
ASKED = dict(num_heads=12)  # of a width that is no usual one
ARGUMENTS = argparse.Namespace(
    model="mae_vit_base_patch16", norm_pix_loss=True, mask_ratio=0.6, input_size=20, batch_size=64, lr=None, blr=1.5e-4
)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """(model of transformers, its state by facebookresearch's names, the parameters that we read of its own folder)."""
    theirs = create("ViTMAEForPreTraining", **AUTOENCODER)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder)
    return theirs, to_facebook(state_of(theirs)), read_weights(folder).params


def encoder_of(state):
    return {name: value for name, value in state.items() if "decoder" not in name and name != "mask_token"}


def notes_of(path, **asked):
    return "; ".join(read_weights(path, asked).notes)


def test_a_full_file_gives_the_numbers_of_transformers(autoencoder, tmp_path):
    theirs, state, _ = autoencoder
    images, noise = pictures(theirs), np.random.default_rng(1).random((2, 16), np.float32)
    expected = run(theirs, images, noise=noise)
    ours = mae_jax.load(save_torch(tmp_path / "checkpoint-799.pth", {"model": state}), **ASKED)
    found = jax.jit(lambda images: ours(images, noise=noise, mask_ratio=0.6))(images)
    assert max_relative(found.loss, expected.loss) < TOLERANCE
    assert max_relative(found.prediction, expected.logits) < TOLERANCE


@pytest.mark.parametrize(
    "content",
    [
        lambda state: {"model": state},
        lambda state: state,
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {
            "model": state, "optimizer": {"state": {0: {"exp_avg": state["norm.bias"]}}, "param_groups": [{"lr": 1.0}]},
            "epoch": 799, "scaler": {"scale": 65536.0}, "args": ARGUMENTS,
        },
    ],
    ids=["model", "bare", "state_dict of DataParallel", "model of DataParallel", "checkpoint of training"],
)  # fmt: skip
def test_however_the_state_is_wrapped_its_bits_load(autoencoder, tmp_path, content):
    _, state, params = autoencoder
    path = save_torch(tmp_path / "checkpoint.pth", content(state))
    asked = {} if "args" in content(state) else ASKED
    check_same_params(read_weights(path, asked).params, params)


def test_the_arguments_of_a_training_run_tell_the_settings(autoencoder, tmp_path):
    content = {"model": autoencoder[1], "optimizer": {}, "epoch": 799, "scaler": {}, "args": ARGUMENTS}
    weights = read_weights(save_torch(tmp_path / "visualize.pth", content))
    expected = dict(
        num_heads=12, decoder_num_heads=16, normalize_targets=True, mask_ratio=0.6, image_size=(20, 20), patch_size=5,
        width=24, depth=2, mlp_width=40, decoder_width=16, decoder_depth=1, decoder_mlp_width=30, norm_epsilon=1e-6,
        activation="gelu", qkv_bias=True, positions="learned", channels=3,
    )  # fmt: skip
    assert {name: weights.config["model"][name] for name in expected} == expected
    assert "; ".join(weights.notes) == "decoder_num_heads=16 assumed, since the file does not say it"
    assert weights.config["data"]["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("name, normalized", [("mae_visualize_vit_base.pth", False), ("mae_pretrain_full.pth", True)])
def test_the_name_of_a_released_file_tells_its_targets_and_this_is_noted(autoencoder, tmp_path, name, normalized):
    path = save_torch(tmp_path / name, {"model": autoencoder[1]})
    assert read_weights(path, ASKED).config["model"]["normalize_targets"] is normalized
    assert f"decoder_num_heads=16, normalize_targets={normalized} assumed" in notes_of(path, **ASKED)
    assert "normalize_targets" not in notes_of(path, **ASKED, normalize_targets=True)


def test_an_encoder_gives_the_features_of_transformers_and_is_told_to_lack_a_decoder(autoencoder, tmp_path):
    theirs, state, _ = autoencoder
    images = pictures(theirs)
    theirs.config.mask_ratio = 0.0
    expected = run(theirs.vit, images, noise=in_order(16, 2)).last_hidden_state
    theirs.config.mask_ratio = 0.6
    path = save_torch(tmp_path / "mae_pretrain_vit_base.pth", {"model": encoder_of(state)})
    with pytest.warns(UserWarning, match="no decoder in it: it can encode, not reconstruct"):
        ours = mae_jax.load(path, **ASKED)
    assert max_relative(jax.jit(ours.encode)(images), expected) < TOLERANCE


def test_an_encoder_cannot_reconstruct_and_says_why_in_one_line(autoencoder, tmp_path):
    theirs, state, _ = autoencoder
    images = pictures(theirs)
    ours = mae_jax.load(save_torch(tmp_path / "encoder.pth", {"model": encoder_of(state)}), **ASKED)
    for attempt in (ours, ours.reconstruct):
        with pytest.raises(UserError, match="no decoder.*model.encode.*mae_visualize") as error:
            attempt(images, key=jax.random.key(0))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "architecture, pool, settings",
    [("ViTForImageClassification", "class", {}), ("BeitForImageClassification", "mean_norm", BEIT)],
)
def test_a_fine_tuned_file_gives_the_logits_of_transformers(tmp_path, architecture, pool, settings):
    theirs = create(architecture, **ENCODER, **settings, num_labels=7)
    images, state = pictures(theirs, 3), to_facebook(state_of(theirs))
    assert ("fc_norm.weight" in state, "norm.weight" in state) == (pool == "mean_norm", pool == "class")
    ours = mae_jax.load(save_torch(tmp_path / "mae_finetuned_vit_base.pth", {"model": state}), **ASKED)
    assert ours.config.pool == pool and not ours.config.batch_norm
    assert max_relative(jax.jit(ours.__call__)(images), run(theirs, images).logits) < TOLERANCE


@pytest.mark.parametrize("pool", ["class", "mean_norm"])  # --cls_token and --global_pool
def test_a_linear_probe_gives_logits_of_normalised_features(tmp_path, pool):
    theirs, rng = create("ViTModel", **ENCODER), np.random.default_rng(5)
    state = to_facebook({name: value for name, value in state_of(theirs).items() if "pooler" not in name})
    images, features = pictures(theirs, 3), []
    hook = theirs.layernorm.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].numpy()))
    run(theirs, images)
    hook.remove()
    x = features[0][:, 0] if pool == "class" else features[0][:, 1:].mean(1)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * state["norm.weight"] + state["norm.bias"]
    mean, variance = (rng.random(24, np.float32) + shift for shift in (-0.5, 0.1))
    kernel, bias = rng.standard_normal((7, 24), np.float32), rng.standard_normal(7, np.float32)
    expected = (x - mean) / np.sqrt(variance + 1e-6) @ kernel.T + bias

    if pool == "mean_norm":
        state |= {f"fc_{name}": state.pop(name) for name in ("norm.weight", "norm.bias")}
    state |= {
        "head.0.running_mean": mean, "head.0.running_var": variance, "head.0.num_batches_tracked": np.array(90),
        "head.1.weight": kernel, "head.1.bias": bias,
    }  # fmt: skip
    path = save_torch(tmp_path / "checkpoint-89.pth", {"model": state})
    ours = mae_jax.load(path, **ASKED)
    assert (ours.config.pool, ours.config.batch_norm) == (pool, True)
    assert max_relative(jax.jit(ours.__call__)(images), expected) < TOLERANCE
    assert not read_weights(path, ASKED).notes  # the counter of batches changes no result


@pytest.mark.parametrize("width, heads", [(768, 12), (1024, 16), (1280, 16)])
def test_heads_of_the_released_files_follow_from_their_width(width, heads, tmp_path):
    state = facebook_state(width, depth=1, mlp=8, patches=4, decoder=None)
    path = save_torch(tmp_path / "mae_pretrain.pth", {"model": state})
    assert read_weights(path).config["model"]["num_heads"] == heads
    assert f"num_heads={heads} assumed, since the file does not say it" in notes_of(path)
