"""What is refused of files of other programs, and how. Mostly without PyTorch."""

import json

import numpy as np
import pytest

from mae_jax.interop import foreign
from mae_jax.interop.tensors import read_tensors
from mae_jax.interop.weights import read_weights
from mae_jax.models.positions import sincos_table
from tests.interop.others import (
    ASKED,
    facebook_state,
    hugging_face,
    refusal,
    save_torch,
)

# ----------------------------------------------------------------------------------------------------------- refusals


# Without these it is another kind of file, whose other tensors are then one too many, or no ViT at all.
DEFINING = ("decoder_embed.weight", "blocks.0.attn.qkv.bias", "pos_embed")


def test_whatever_tensor_is_missing_it_is_named(write_model):
    state = facebook_state()
    for name in state:
        message = refusal(write_model({n: v for n, v in state.items() if n != name}), **ASKED)
        assert name in DEFINING or name in message, message


def test_whatever_tensor_has_another_shape_it_is_refused_and_named_with_both_shapes(write_model):
    state = facebook_state()
    shapes_that_define = {  # the others' shapes follow from theirs
        "cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "decoder_embed.weight",
        "decoder_blocks.0.mlp.fc1.weight", "pos_embed",
    }  # fmt: skip
    for name, values in state.items():
        other = np.concatenate([values, values[..., -1:]], axis=-1)
        message = refusal(write_model(state | {name: other}), **ASKED)
        if name not in shapes_that_define:
            assert all(text in message for text in (name, str(other.shape), str(values.shape))), message


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 2), (2, 2, 2, 2, 2)])
def test_whatever_tensor_has_another_number_of_axes_it_is_refused(write_model, shape):
    state = facebook_state()
    for name in state:
        refusal(write_model(state | {name: np.zeros(shape, np.float32)}), **ASKED)


def test_parts_of_queries_keys_and_values_must_be_as_large_as_one_another(write_model):
    state, config = hugging_face()
    name = "vit.encoder.layer.0.attention.attention.{}.weight"
    moved = {
        name.format("query"): np.zeros((20, 24), np.float32), name.format("key"): np.zeros((28, 24), np.float32)
    }  # fmt: skip
    narrow = {name.format("key"): np.zeros((24, 1), np.float32)}
    for wrong in (moved, narrow):
        assert "blocks.0.attn.qkv.weight" in refusal(write_model(state | wrong, config))


def test_queries_without_keys_are_refused(write_model):
    state, config = hugging_face()
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    assert "only q, v of q, k and v" in refusal(write_model(state, config))


def test_nothing_is_read_of_a_file_that_is_refused(write_model, monkeypatch):
    state = facebook_state()
    del state["blocks.1.mlp.fc2.bias"]

    def read_no_values(path):
        tensors, others = read_tensors(path)
        tables = ("pos_embed", "decoder_pos_embed")  # whether they are the formula shows in their values only
        return {name: t if name in tables else t._replace(read=pytest.fail) for name, t in tensors.items()}, others

    monkeypatch.setattr(foreign, "read_tensors", read_no_values)
    assert "lacks blocks.1.mlp.fc2.bias" in refusal(write_model(state), **ASKED)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.ls1.gamma", "blocks.1.attn.q_norm.weight", "decoder_blocks.0.ls2.gamma", "reg_token", "dist_token",
        "norm_pre.weight", "attn_pool.q.weight", "blocks.0.attn.relative_position_bias_table", "pre_logits.fc.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_would_change_the_results_is_refused_and_named(write_model, name):
    assert name in refusal(write_model(facebook_state() | {name: np.ones(24, np.float32)}), **ASKED)


@pytest.mark.parametrize(
    "name",
    ["encoder.layer.0.lambda_1", "vit.encoder.layer.1.attention.attention.relative_position_bias", "vit.layers.0.x",
     "decoder.decoder_layers.0.lambda_2", "embeddings.register_tokens", "vit.embeddings.distillation_token"],
)  # fmt: skip
def test_a_tensor_of_transformers_that_would_change_the_results_is_refused(write_model, name):
    state, config = hugging_face()
    message = refusal(write_model(state | {name: np.ones(24, np.float32)}, config))
    assert "is not a plain ViT" in message and name.removeprefix("vit.") in message


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(model_type="bert"), "model_type='bert'"),
        (dict(model_type="deit"), "model_type='deit'"),
        (dict(hidden_act="xielu"), "model.activation='xielu'"),
        (dict(hidden_size=48), "48"),
        (dict(num_hidden_layers=3), "depth is 3, but it has 2 blocks"),
        (dict(num_hidden_layers=10**9), "depth is 1000000000, but it has 2 blocks"),
        (dict(num_hidden_layers=1), "depth is 1, but it has 2 blocks"),
        (dict(intermediate_size=41), "41"),
        (dict(image_size=25), "pos_embed"),
        (dict(patch_size=4), "pos_embed has shape (1, 17, 24)"),
        (dict(num_channels=1), "has shape (75,)"),
        (dict(qkv_bias=False), "attn.qkv.bias"),
        (dict(decoder_hidden_size=32), "decoder"),
        (dict(decoder_num_hidden_layers=2), "decoder_depth is 2, but it has 1 decoder_blocks"),
        (dict(decoder_intermediate_size=31), "31"),
        (dict(num_attention_heads=5), "num_heads=5"),
        (dict(mask_ratio=1.0), "mask_ratio=1.0"),
        (dict(patch_size=[5, 4]), "patches must be square"),
    ],
)
def test_a_config_json_that_contradicts_the_tensors_or_has_no_counterpart_is_refused(write_model, changes, text):
    assert text in refusal(write_model(*hugging_face(**changes)))


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"{\n'a': 1}"])
def test_a_config_json_that_is_no_json_is_refused(write_model, content):
    path = write_model(hugging_face()[0])
    (path.parent / "config.json").write_bytes(content)
    assert "config.json is not readable JSON" in refusal(path)


def test_a_table_of_positions_that_is_missing_is_not_taken_for_the_formulas(write_model):
    encoder, decoder = sincos_table((4, 4), 24)[None], sincos_table((4, 4), 16)[None]
    facebook = facebook_state() | {"pos_embed": encoder, "decoder_pos_embed": decoder}
    state, config = hugging_face()
    names = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")
    state |= dict(zip(names, (encoder, decoder), strict=True))
    for name in ("pos_embed", "decoder_pos_embed"):
        assert name in refusal(write_model({n: v for n, v in facebook.items() if n != name}), **ASKED)
    for name in names:
        assert "pos_embed" in refusal(write_model({n: v for n, v in state.items() if n != name}, config))


@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden_size="24"), dict(hidden_size=None), dict(image_size=None), dict(image_size="20"),
        dict(patch_size=[5]), dict(num_hidden_layers=2.5), dict(mask_ratio="0.6"), dict(hidden_act=["gelu"]),
        dict(layer_norm_eps="1e-6"), dict(hidden_act=None),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_json_with_values_of_a_wrong_type_is_refused(write_model, changes):
    refusal(write_model(*hugging_face(**changes)))


@pytest.mark.parametrize(
    "beside",
    [
        {"mae_jax": {"model": {"a_later_setting": 1}}},
        {"mae_jax": {"data": {"mean": 3}}},
    ],
    ids=str,
)
def test_what_a_pytorch_file_says_of_itself_in_a_wrong_form_is_refused(tmp_path, beside):
    refusal(save_torch(tmp_path / "model.pth", {"model": facebook_state()} | beside), **ASKED)


def test_a_file_without_a_vit_is_refused_with_what_it_has(write_model):
    message = refusal(write_model({"conv1.weight": np.zeros((3, 3), np.float32), "fc.bias": np.zeros(3, np.float32)}))
    assert "has no complete ViT" in message and "conv1.weight" in message and "lacks cls_token" in message
    assert "it has nothing" in refusal(write_model({}))


def test_a_head_count_that_cannot_be_known_is_asked_for(write_model):
    path = write_model(facebook_state(decoder=None))
    assert "does not say its num_heads" in refusal(path) and "num_heads=..." in refusal(path)
    path = write_model(facebook_state(192, decoder=(20, 1, 30)))
    assert "does not say its decoder_num_heads" in refusal(path)
    assert read_weights(path, dict(decoder_num_heads=5)).config["model"]["decoder_num_heads"] == 5


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(num_head=3), "has no setting 'num_head'; did you mean \"num_heads\"?"),
        (dict(width=24), "has no setting 'width'"),
        (dict(num_heads=6), "num_heads=6 cannot be set"),
        (dict(normalize_targets=False), "normalize_targets=False cannot be set"),
        (dict(norm_epsilon=1e-12), "norm_epsilon=1e-12 cannot be set"),
        (dict(positions="sincos"), "positions='sincos'"),
        (dict(positions="learnt"), "positions"),
        (dict(dtype="float16"), "dtype"),
        (dict(image_size=21), "21"),
        (dict(mask_ratio=0.999), "mask_ratio"),
    ],
)
def test_settings_that_are_unknown_impossible_or_contradict_the_file_are_refused(write_model, settings, text):
    assert text in refusal(write_model(*hugging_face()), **settings)


def test_a_setting_that_the_file_states_may_be_repeated(write_model):
    read_weights(write_model(*hugging_face()), dict(num_heads=12, norm_epsilon=1e-6, decoder_num_heads=16))


# ------------------------------------------------------------------------------- what a file says and cannot be true


def test_a_block_whose_number_lies_is_refused_at_once(write_model):
    message = refusal(
        write_model(facebook_state() | {"blocks.30000000.norm1.weight": np.ones(24, np.float32)}), **ASKED
    )
    assert "it has 3 blocks, up to number 30000000" in message


@pytest.mark.parametrize("step", ["../../../elsewhere", -1, 2.5, True, [3]])
def test_a_step_that_is_no_count_is_not_believed(write_model, step):
    assert read_weights(write_model(*hugging_face(step=step))).step == 0


@pytest.mark.parametrize("name", ["norm_pix_loss", "qkv_bias"])
def test_a_text_is_neither_true_nor_false(write_model, name):
    assert "'false' is no bool" in refusal(write_model(*hugging_face(**{name: "false"})))


@pytest.mark.parametrize(
    "preprocessor",
    [
        {"image_std": [0, 0, 0]},
        {"image_mean": [float("nan")] * 3},
        {"crop_pct": 7},
        {"image_mean": [1, 2]},
        {"rescale_factor": 0},
        {"rescale_factor": float("inf")},
        {"crop_pct": 1e-300},
        {"image_std": [1e-300] * 3},
    ],
    ids=str,
)
def test_a_preprocessor_that_no_picture_survives_is_refused(write_model, preprocessor):
    path = write_model(*hugging_face())
    (path.parent / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    refusal(path.parent)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3"])
def test_a_config_json_that_is_no_object_is_refused(write_model, text):
    path = write_model(*hugging_face())
    (path.parent / "config.json").write_text(text)
    assert "config.json is not readable JSON" in refusal(path.parent)
