"""What a file of another program is, what it says of its model, and what is refused. Mostly without PyTorch."""

import functools
import json
import os

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.errors import UserError
from mae_jax.interop import foreign
from mae_jax.interop.files import read_tensors
from mae_jax.interop.hub import fetch, is_hub
from mae_jax.interop.weights import find_weights, read_weights
from mae_jax.models.positions import sincos_table
from tests.interop.others import (
    check_same_params,
    create,
    facebook_state,
    save_safetensors,
    save_torch,
)
from tests.reference import max_relative

HEADS = dict(num_heads=12)  # of a width that is no usual one
ASKED = HEADS | dict(decoder_num_heads=16, normalize_targets=True)


@pytest.fixture
def write(tmp_path):
    """Writes a safetensors file, with this config.json beside it."""
    return functools.partial(save_safetensors, tmp_path / "model" / "model.safetensors")


def refusal(path, **settings) -> str:
    """The one line with which `mae_jax.load` refuses."""
    with pytest.raises(UserError) as error:
        mae_jax.load(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def hugging_face(**changes):
    """(tensors, config.json) of a small ViTMAEForPreTraining in the spelling of transformers 4."""
    state = {}
    names = {
        "cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "norm": "vit.layernorm",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }  # fmt: skip
    for name, values in facebook_state().items():
        module, _, leaf = name.rpartition(".")
        stack, _, inner = module.partition(".")
        if stack in ("blocks", "decoder_blocks"):
            number, _, inner = inner.partition(".")
            prefix = f"{'vit.encoder.layer' if stack == 'blocks' else 'decoder.decoder_layers'}.{number}."
            if inner == "attn.qkv":
                for letters, part in zip(("query", "key", "value"), np.split(values, 3), strict=True):
                    state[f"{prefix}attention.attention.{letters}.{leaf}"] = part
            else:
                state[f"{prefix}{names[inner]}.{leaf}"] = values
        elif name in names:
            state[names[name]] = values
        else:
            state[f"{names[module]}.{leaf}" if module in names else f"decoder.{name}"] = values
    config = dict(
        model_type="vit_mae", hidden_size=24, num_hidden_layers=2, num_attention_heads=12, intermediate_size=40,
        image_size=20, patch_size=5, num_channels=3, layer_norm_eps=1e-6, decoder_hidden_size=16,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=16, decoder_intermediate_size=30, norm_pix_loss=True,
        mask_ratio=0.6,
    )  # fmt: skip
    return state, config | changes


# -------------------------------------------------------------------------------------------------------- recognition


def test_files_and_folders_of_weights_are_told_from_workdirs(write, tmp_path):
    path = write(facebook_state())
    assert foreign.is_foreign(path) and foreign.is_foreign(path.parent)
    assert not foreign.is_foreign(tmp_path) and not foreign.is_foreign(tmp_path / "nowhere")
    (path.parent / "checkpoints").mkdir()  # a workdir into which somebody has put a file
    assert not foreign.is_foreign(path.parent) and foreign.is_foreign(path)


def test_paths_may_be_relative_begin_with_a_tilde_and_have_any_name(write, tmp_path, monkeypatch):
    path = write(facebook_state())
    params = read_weights(path, HEADS).params
    named = path.rename(path.with_name("weights without an ending"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for other in (named, "model/weights without an ending", "~/model/weights without an ending", str(named)):
        check_same_params(read_weights(other, HEADS).params, params)


def test_tables_that_are_the_formulas_are_no_parameters_and_others_are(write):
    state = facebook_state()
    learned = read_weights(write(state), HEADS)
    assert learned.config["model"]["positions"] == "learned"
    np.testing.assert_array_equal(learned.params["encoder"]["positions"], state["pos_embed"][0])
    np.testing.assert_array_equal(learned.params["decoder"]["positions"], state["decoder_pos_embed"][0])
    state |= {"pos_embed": sincos_table((4, 4), 24)[None], "decoder_pos_embed": sincos_table((4, 4), 16)[None]}
    fixed = read_weights(write(state), HEADS)
    assert fixed.config["model"]["positions"] == "sincos"
    assert not any("positions" in part for part in fixed.params.values())
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + np.float32(1e-6)
    assert read_weights(write(state), HEADS).config["model"]["positions"] == "learned"


def test_another_image_size_resizes_the_tables_as_a_model_would_at_that_size(write):
    path = write(facebook_state())
    small, large = mae_jax.load(path, **ASKED), mae_jax.load(path, **ASKED, image_size=(35, 15))
    assert large.config.image_size == large.processor.image_size == (35, 15)
    images = np.random.default_rng(0).standard_normal((2, 35, 15, 3)).astype(np.float32)
    # The one resizes in its compiled program, the other before: roundings differ.
    assert max_relative(jax.jit(large.encode)(images), jax.jit(small.encode)(images)) < 1e-5


# ----------------------------------------------------------------------------------------------- settings and notes


def test_shapes_tell_all_settings_but_the_heads(write):
    state = facebook_state(32, 3, 50, 2, 1, 25, (8, 2, 10))
    for name in [name for name in state if name.endswith("qkv.bias")]:
        del state[name]
    model = read_weights(write(state), dict(num_heads=4, decoder_num_heads=2)).config["model"]
    expected = dict(
        width=32, depth=3, mlp_width=50, patch_size=2, channels=1, image_size=(10, 10), decoder_width=8,
        decoder_depth=2, decoder_mlp_width=10, qkv_bias=False, norm_epsilon=1e-6, activation="gelu",
    )  # fmt: skip
    assert {name: model[name] for name in expected} == expected


@pytest.mark.parametrize("asked, size", [(None, None), ((10, 15), (10, 15)), ((15, 10), (15, 10))])
def test_images_that_are_not_square_are_asked_for(write, asked, size):
    path = write(facebook_state(patches=6))
    if asked is None:
        assert "positions for 6 patches, which make no square" in refusal(path, **ASKED)
    else:
        assert read_weights(path, ASKED | {"image_size": asked}).config["model"]["image_size"] == size


def test_what_is_assumed_missing_or_left_over_is_a_warning_each_that_names_the_file(write):
    state = facebook_state(192, decoder=None, channels=4) | {"pooler.dense.weight": np.zeros((3, 3), np.float32)}
    path = write(state)
    with pytest.warns(UserWarning) as warnings:
        mae_jax.load(path)
    texts = [str(warning.message) for warning in warnings]
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in texts)
    notes = " | ".join(text.removeprefix(f"{path}: ") for text in texts)
    assert notes == (
        "num_heads=3 assumed, since the file does not say it | "
        "mean and std of its pictures are not in it: both are taken as 0.5 | "
        "no decoder in it: it can encode, not reconstruct | left over: pooler.dense.weight"
    )


def test_a_file_that_says_everything_is_loaded_without_a_warning(write, recwarn):
    folder = write(*hugging_face()).parent
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    mae_jax.load(folder)
    assert not recwarn.list


def test_the_pooler_of_a_vit_is_left_over_and_only_noted(tmp_path):
    model = create("ViTModel", hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8,
                   image_size=8, patch_size=4)  # fmt: skip
    model.save_pretrained(tmp_path)
    notes = read_weights(tmp_path).notes
    assert "left over: pooler.dense.bias, pooler.dense.weight" in notes


def test_dropout_of_a_config_json_is_noted_as_not_used(write):
    notes = read_weights(write(*hugging_face(hidden_dropout_prob=0.1))).notes
    assert notes[0] == "hidden_dropout_prob=0.1 is not used: there is no dropout here"


def test_names_of_classes_are_those_of_the_config_json(tmp_path):
    labels = {0: "ant", 1: "bee", 2: "cat"}
    for folder, names in (("named", dict(id2label=labels)), ("numbered", dict(num_labels=3))):
        create("ViTForImageClassification", hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
               intermediate_size=8, image_size=8, patch_size=4, **names).save_pretrained(tmp_path / folder)  # fmt: skip
    assert read_weights(tmp_path / "named").config["class_names"] == ["ant", "bee", "cat"]
    assert read_weights(tmp_path / "numbered").config["class_names"] is None
    assert read_weights(tmp_path / "numbered").config["classifier"]["num_classes"] == 3


# ----------------------------------------------------------------------------------------------------------- refusals


# Without these it is another kind of file, whose other tensors are then one too many, or no ViT at all.
DEFINING = ("decoder_embed.weight", "blocks.0.attn.qkv.bias", "pos_embed")


def test_whatever_tensor_is_missing_it_is_named(write):
    state = facebook_state()
    for name in state:
        message = refusal(write({n: v for n, v in state.items() if n != name}), **ASKED)
        assert name in DEFINING or name in message, message


def test_whatever_tensor_has_another_shape_it_is_refused_and_named_with_both_shapes(write):
    state = facebook_state()
    shapes_that_define = {  # the others' shapes follow from theirs
        "cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "decoder_embed.weight",
        "decoder_blocks.0.mlp.fc1.weight", "pos_embed",
    }  # fmt: skip
    for name, values in state.items():
        other = np.concatenate([values, values[..., -1:]], axis=-1)
        message = refusal(write(state | {name: other}), **ASKED)
        if name not in shapes_that_define:
            assert all(text in message for text in (name, str(other.shape), str(values.shape))), message


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 2), (2, 2, 2, 2, 2)])
def test_whatever_tensor_has_another_number_of_axes_it_is_refused(write, shape):
    state = facebook_state()
    for name in state:
        refusal(write(state | {name: np.zeros(shape, np.float32)}), **ASKED)


def test_parts_of_queries_keys_and_values_must_be_as_large_as_one_another(write):
    state, config = hugging_face()
    name = "vit.encoder.layer.0.attention.attention.{}.weight"
    moved = {
        name.format("query"): np.zeros((20, 24), np.float32), name.format("key"): np.zeros((28, 24), np.float32)
    }  # fmt: skip
    narrow = {name.format("key"): np.zeros((24, 1), np.float32)}
    for wrong in (moved, narrow):
        assert "blocks.0.attn.qkv.weight" in refusal(write(state | wrong, config))


def test_queries_without_keys_are_refused(write):
    state, config = hugging_face()
    del state["vit.encoder.layer.1.attention.attention.key.weight"]
    assert "only query, value of query, key and value" in refusal(write(state, config))


def test_nothing_is_read_of_a_file_that_is_refused(write, monkeypatch):
    state = facebook_state()
    del state["blocks.1.mlp.fc2.bias"]

    def read_no_values(path):
        file = read_tensors(path)
        tables = ("pos_embed", "decoder_pos_embed")  # whether they are the formula shows in their values only
        unread = {name: t if name in tables else t._replace(read=pytest.fail) for name, t in file.tensors.items()}
        return file._replace(tensors=unread)

    monkeypatch.setattr(foreign, "read_tensors", read_no_values)
    assert "lacks blocks.1.mlp.fc2.bias" in refusal(write(state), **ASKED)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.ls1.gamma", "blocks.1.attn.q_norm.weight", "decoder_blocks.0.ls2.gamma", "reg_token", "dist_token",
        "norm_pre.weight", "attn_pool.q.weight", "blocks.0.attn.relative_position_bias_table", "pre_logits.fc.weight",
    ],
)  # fmt: skip
def test_a_tensor_that_would_change_the_results_is_refused_and_named(write, name):
    assert name in refusal(write(facebook_state() | {name: np.ones(24, np.float32)}), **ASKED)


@pytest.mark.parametrize(
    "name",
    ["encoder.layer.0.lambda_1", "vit.encoder.layer.1.attention.attention.relative_position_bias", "vit.layers.0.x",
     "decoder.decoder_layers.0.lambda_2", "embeddings.register_tokens", "vit.embeddings.distillation_token"],
)  # fmt: skip
def test_a_tensor_of_transformers_that_would_change_the_results_is_refused(write, name):
    state, config = hugging_face()
    message = refusal(write(state | {name: np.ones(24, np.float32)}, config))
    assert "is not a plain ViT" in message and name.removeprefix("vit.") in message


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(model_type="bert"), "model_type 'bert'"),
        (dict(model_type="deit"), "model_type 'deit'"),
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
def test_a_config_json_that_contradicts_the_tensors_or_has_no_counterpart_is_refused(write, changes, text):
    assert text in refusal(write(*hugging_face(**changes)))


@pytest.mark.parametrize("content", [b"{", b"", b"\xff", b"{\n'a': 1}"])
def test_a_config_json_that_is_no_json_is_refused(write, content):
    path = write(hugging_face()[0])
    (path.parent / "config.json").write_bytes(content)
    assert "config.json is not readable JSON" in refusal(path)


def test_a_table_of_positions_that_is_missing_is_not_taken_for_the_formulas(write):
    encoder, decoder = sincos_table((4, 4), 24)[None], sincos_table((4, 4), 16)[None]
    facebook = facebook_state() | {"pos_embed": encoder, "decoder_pos_embed": decoder}
    state, config = hugging_face()
    names = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")
    state |= dict(zip(names, (encoder, decoder), strict=True))
    for name in ("pos_embed", "decoder_pos_embed"):
        assert name in refusal(write({n: v for n, v in facebook.items() if n != name}), **ASKED)
    for name in names:
        assert "pos_embed" in refusal(write({n: v for n, v in state.items() if n != name}, config))


@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden_size="24"), dict(hidden_size=None), dict(image_size=None), dict(image_size="20"),
        dict(patch_size=[5]), dict(num_hidden_layers=2.5), dict(mask_ratio="0.6"), dict(hidden_act=["gelu"]),
        dict(layer_norm_eps="1e-6"), dict(hidden_act=None),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_json_with_values_of_a_wrong_type_is_refused(write, changes):
    refusal(write(*hugging_face(**changes)))


@pytest.mark.parametrize(
    "beside",
    [
        {"mae_jax": {"model": {"a_later_setting": 1}}},
        {"mae_jax": 3},
        {"mae_jax": {"data": {"mean": 3}}},
    ],
    ids=str,
)
def test_what_a_pytorch_file_says_of_itself_in_a_wrong_form_is_refused(tmp_path, beside):
    refusal(save_torch(tmp_path / "model.pth", {"model": facebook_state()} | beside), **ASKED)


def test_a_file_without_a_vit_is_refused_with_what_it_has(write):
    message = refusal(write({"conv1.weight": np.zeros((3, 3), np.float32), "fc.bias": np.zeros(3, np.float32)}))
    assert "holds no ViT" in message and "conv1.weight" in message and "lacks cls_token" in message
    assert "it has nothing" in refusal(write({}))


def test_a_head_count_that_cannot_be_known_is_asked_for(write):
    path = write(facebook_state(decoder=None))
    assert "does not say its num_heads" in refusal(path) and "num_heads=..." in refusal(path)
    path = write(facebook_state(192, decoder=(20, 1, 30)))
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
def test_settings_that_are_unknown_impossible_or_contradict_the_file_are_refused(write, settings, text):
    assert text in refusal(write(*hugging_face()), **settings)


def test_a_setting_that_the_file_states_may_be_repeated(write):
    read_weights(write(*hugging_face()), dict(num_heads=12, norm_epsilon=1e-6, decoder_num_heads=16))


# ---------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(monkeypatch):
    """Calls of huggingface_hub.snapshot_download, which `hub["answer"](name)` answers."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls = {"asked": [], "answer": None}

    def snapshot_download(name, **options):
        calls["asked"].append((name, options["revision"]))
        return calls["answer"](options["allow_patterns"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_model_of_the_hub_is_fetched_and_loaded(hub, write):
    path = write(*hugging_face())
    hub["answer"] = lambda patterns: str(path.parent)
    check_same_params(read_weights("hf://facebook/vit-mae-base").params, read_weights(path).params)
    assert fetch("hf://owner/name@v1.0") == path.parent
    assert hub["asked"] == [("facebook/vit-mae-base", None), ("owner/name", "v1.0")]


def test_files_of_pytorch_are_fetched_only_if_there_are_no_safetensors(hub, tmp_path):
    def answer(patterns):
        if "pytorch_model*.bin" in patterns:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    hub["answer"] = answer
    assert fetch("hf://owner/old") == tmp_path and len(hub["asked"]) == 2


def test_without_a_network_it_is_said_what_to_do_in_one_line(hub):
    def answer(patterns):
        raise ConnectionError("name resolution failed\nand more")

    hub["answer"] = answer
    message = refusal("hf://facebook/vit-mae-base")
    assert "hf://facebook/vit-mae-base cannot be downloaded" in message and "name resolution failed" in message


def test_a_model_of_the_hub_without_weights_is_refused(hub, tmp_path):
    hub["answer"] = lambda patterns: str(tmp_path)
    assert "has no weights" in refusal("hf://owner/empty")


@pytest.mark.parametrize("address", ["hf://", "hf://vit-mae-base", "hf://a/b/c", "hf://a/b@", "hf://a b/c", "hf:/x"])
def test_an_address_of_another_form_is_refused_before_anything_is_fetched(hub, address):
    assert is_hub(address) and "is not of the form hf://owner/name" in refusal(address)
    assert not hub["asked"]


def test_a_path_that_lost_a_slash_is_still_of_the_hub(hub, write):
    path = write(facebook_state())
    hub["answer"] = lambda patterns: str(path.parent)
    assert find_weights(os.path.normpath("hf://owner/name")) == path.parent
    assert hub["asked"] == [("owner/name", None)]


# ------------------------------------------------------------------------------- what a file says and cannot be true


def test_a_block_whose_number_lies_is_refused_at_once(write):
    message = refusal(write(facebook_state() | {"blocks.30000000.norm1.weight": np.ones(24, np.float32)}), **ASKED)
    assert "has 3 blocks, but one of them has the number 30000000" in message


@pytest.mark.parametrize("step", ["../../../elsewhere", -1, 2.5, True, [3]])
def test_a_step_that_is_no_count_is_not_believed(write, step):
    assert read_weights(write(*hugging_face(step=step))).step == 0


@pytest.mark.parametrize("name", ["norm_pix_loss", "qkv_bias"])
def test_a_text_is_neither_true_nor_false(write, name):
    assert "is neither true nor false" in refusal(write(*hugging_face(**{name: "false"})))


@pytest.mark.parametrize(
    "preprocessor",
    [{"image_std": [0, 0, 0]}, {"image_mean": [float("nan")] * 3}, {"crop_pct": 7}, {"image_mean": [1, 2]}],
    ids=str,
)
def test_a_preprocessor_that_no_picture_survives_is_refused(write, preprocessor):
    path = write(*hugging_face())
    (path.parent / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    refusal(path.parent)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3"])
def test_a_config_json_that_is_no_object_is_refused(write, text):
    path = write(*hugging_face())
    (path.parent / "config.json").write_text(text)
    assert "config.json is not readable JSON" in refusal(path.parent)


def test_a_fixed_table_is_computed_for_a_size_with_as_many_patches(write):
    tables = {"pos_embed": sincos_table((4, 4), 24)[None], "decoder_pos_embed": sincos_table((4, 4), 16)[None]}
    path = write(facebook_state() | tables)
    side = 4 * 5
    square, wide = mae_jax.load(path, **ASKED), mae_jax.load(path, image_size=(side // 2, side * 2), **ASKED)
    images = np.random.default_rng(0).standard_normal((1, side // 2, side * 2, 3)).astype(np.float32)
    assert square.config.positions == wide.config.positions == "sincos"
    np.testing.assert_allclose(wide.encode(images), square.encode(images), rtol=0, atol=1e-4)
