"""What a file of another program is, and what it says of its model. Mostly without PyTorch."""

import json

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.interop import foreign
from mae_jax.interop.weights import read_weights
from mae_jax.models.positions import sincos_table
from tests.interop.others import (
    ASKED,
    HEADS,
    check_same_params,
    create,
    facebook_state,
    hugging_face,
    refusal,
)
from tests.reference import max_relative

# -------------------------------------------------------------------------------------------------------- recognition


def test_files_and_folders_of_weights_are_told_from_workdirs(write_model, tmp_path):
    path = write_model(facebook_state())
    assert foreign.is_foreign(path) and foreign.is_foreign(path.parent)
    assert not foreign.is_foreign(tmp_path) and not foreign.is_foreign(tmp_path / "nowhere")
    (path.parent / "checkpoints").mkdir()  # a workdir into which somebody has put a file
    assert not foreign.is_foreign(path.parent) and foreign.is_foreign(path)


def test_paths_may_be_relative_begin_with_a_tilde_and_have_any_name(write_model, tmp_path, monkeypatch):
    path = write_model(facebook_state())
    params = read_weights(path, HEADS).params
    named = path.rename(path.with_name("weights without an ending"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for other in (named, "model/weights without an ending", "~/model/weights without an ending", str(named)):
        check_same_params(read_weights(other, HEADS).params, params)


def test_tables_that_are_the_formulas_are_no_parameters_and_others_are(write_model):
    state = facebook_state()
    learned = read_weights(write_model(state), HEADS)
    assert learned.config["model"]["positions"] == "learned"
    np.testing.assert_array_equal(learned.params["encoder"]["positions"], state["pos_embed"][0])
    np.testing.assert_array_equal(learned.params["decoder"]["positions"], state["decoder_pos_embed"][0])
    state |= {"pos_embed": sincos_table((4, 4), 24)[None], "decoder_pos_embed": sincos_table((4, 4), 16)[None]}
    fixed = read_weights(write_model(state), HEADS)
    assert fixed.config["model"]["positions"] == "sincos"
    assert not any("positions" in part for part in fixed.params.values())
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + np.float32(1e-6)
    assert read_weights(write_model(state), HEADS).config["model"]["positions"] == "learned"


def test_another_image_size_resizes_the_tables_as_a_model_would_at_that_size(write_model):
    path = write_model(facebook_state())
    small, large = mae_jax.load(path, **ASKED), mae_jax.load(path, **ASKED, image_size=(35, 15))
    assert large.config.image_size == large.processor.image_size == (35, 15)
    images = np.random.default_rng(0).standard_normal((2, 35, 15, 3)).astype(np.float32)
    # The one resizes in its compiled program, the other before: roundings differ.
    assert max_relative(jax.jit(large.encode)(images), jax.jit(small.encode)(images)) < 1e-5


# ----------------------------------------------------------------------------------------------- settings and notes


def test_shapes_tell_all_settings_but_the_heads(write_model):
    state = facebook_state(32, 3, 50, 2, 1, 25, (8, 2, 10))
    for name in [name for name in state if name.endswith("qkv.bias")]:
        del state[name]
    model = read_weights(write_model(state), dict(num_heads=4, decoder_num_heads=2)).config["model"]
    expected = dict(
        width=32, depth=3, mlp_width=50, patch_size=2, channels=1, image_size=(10, 10), decoder_width=8,
        decoder_depth=2, decoder_mlp_width=10, qkv_bias=False, norm_epsilon=1e-6, activation="gelu",
    )  # fmt: skip
    assert {name: model[name] for name in expected} == expected


@pytest.mark.parametrize("asked, size", [(None, None), ((10, 15), (10, 15)), ((15, 10), (15, 10))])
def test_images_that_are_not_square_are_asked_for(write_model, asked, size):
    path = write_model(facebook_state(patches=6))
    if asked is None:
        assert "positions for 6 patches, which do not form a square" in refusal(path, **ASKED)
    else:
        assert read_weights(path, ASKED | {"image_size": asked}).config["model"]["image_size"] == size


def test_what_is_assumed_missing_or_left_over_is_a_warning_each_that_names_the_file(write_model):
    state = facebook_state(192, decoder=None, channels=4) | {"pooler.dense.weight": np.zeros((3, 3), np.float32)}
    path = write_model(state)
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


def test_a_file_that_says_everything_is_loaded_without_a_warning(write_model, recwarn):
    folder = write_model(*hugging_face()).parent
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    mae_jax.load(folder)
    assert not recwarn.list


def test_the_pooler_of_a_vit_is_left_over_and_only_noted(tmp_path):
    model = create("ViTModel", hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8,
                   image_size=8, patch_size=4)  # fmt: skip
    model.save_pretrained(tmp_path)
    notes = read_weights(tmp_path).notes
    assert "left over: pooler.dense.bias, pooler.dense.weight" in notes


def test_dropout_of_a_config_json_is_noted_as_not_used(write_model):
    notes = read_weights(write_model(*hugging_face(hidden_dropout_prob=0.1))).notes
    assert notes[0] == "hidden_dropout_prob=0.1 is not used: there is no dropout here"


def test_names_of_classes_are_those_of_the_config_json(tmp_path):
    labels = {0: "ant", 1: "bee", 2: "cat"}
    for folder, names in (("named", dict(id2label=labels)), ("numbered", dict(num_labels=3))):
        create("ViTForImageClassification", hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
               intermediate_size=8, image_size=8, patch_size=4, **names).save_pretrained(tmp_path / folder)  # fmt: skip
    assert read_weights(tmp_path / "named").config["class_names"] == ["ant", "bee", "cat"]
    assert read_weights(tmp_path / "numbered").config["class_names"] is None
    assert read_weights(tmp_path / "numbered").config["classifier"]["num_classes"] == 3


def test_a_fixed_table_is_computed_for_a_size_with_as_many_patches(write_model):
    tables = {"pos_embed": sincos_table((4, 4), 24)[None], "decoder_pos_embed": sincos_table((4, 4), 16)[None]}
    path = write_model(facebook_state() | tables)
    side = 4 * 5
    square, wide = mae_jax.load(path, **ASKED), mae_jax.load(path, image_size=(side // 2, side * 2), **ASKED)
    images = np.random.default_rng(0).standard_normal((1, side // 2, side * 2, 3)).astype(np.float32)
    assert square.config.positions == wide.config.positions == "sincos"
    np.testing.assert_allclose(jax.jit(wide.encode)(images), jax.jit(square.encode)(images), rtol=0, atol=1e-4)


def test_names_of_tensors_are_escaped_in_warnings(write_model):
    path = write_model(facebook_state(192) | {"\x1b[31mpooler\n": np.zeros(3, np.float32)})
    with pytest.warns(UserWarning) as warnings:
        mae_jax.load(path)
    texts = [str(warning.message) for warning in warnings]
    assert any(r"\x1b[31mpooler\n" in text for text in texts) and not any("\x1b" in text for text in texts)
