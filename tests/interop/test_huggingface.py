"""Models of transformers with random weights, saved by it and loaded by us: the same numbers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import mae_jax
from mae_jax.interop.huggingface import read_settings
from mae_jax.interop.weights import read_weights
from mae_jax.models.layers import ACTIVATIONS
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError
from tests.interop.others import (
    AUTOENCODER,
    BEIT,
    ENCODER,
    check_same_params,
    create,
    in_order,
    pictures,
    respelled,
    run,
    save_safetensors,
    save_torch,
    state_of,
)
from tests.reference import max_relative

pytestmark = pytest.mark.filterwarnings("ignore:.*(mean and std|left over|no decoder|its processor)")

# About two hundred roundings of float32; orders of summation and erf differ, which makes about twenty (2e-6).
TOLERANCE = 2e-5

MODELS = {
    "grey, odd MLPs, no bias": dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=250, hidden_act="relu",
        qkv_bias=False, image_size=25, patch_size=5, num_channels=1, layer_norm_eps=1e-12, mask_ratio=0.6,
        norm_pix_loss=False, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=33,
    ),
    "rgb, wide norms": dict(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, hidden_act="gelu",
        image_size=12, patch_size=4, num_channels=3, layer_norm_eps=1e-2, mask_ratio=0.75, norm_pix_loss=True,
        decoder_hidden_size=20, decoder_num_hidden_layers=2, decoder_num_attention_heads=5,
        decoder_intermediate_size=50,
    ),
    "two channels, tanh GELU": dict(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=1, intermediate_size=20, hidden_act="gelu_new",
        image_size=8, patch_size=2, num_channels=2, mask_ratio=0.2, norm_pix_loss=True, decoder_hidden_size=8,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=1, decoder_intermediate_size=7,
    ),
}  # fmt: skip


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def params_of(path, **asked):
    return read_weights(path, asked).params


@pytest.fixture(scope="module", params=MODELS)
def both(request, tmp_path_factory):
    """(our model, its output, their model, its output) of the same file, images and noise."""
    theirs = create("ViTMAEForPreTraining", **MODELS[request.param])
    images = pictures(theirs, 3)
    noise = np.random.default_rng(1).random((3, theirs.vit.embeddings.patch_embeddings.num_patches), np.float32)
    everything = dict(output_hidden_states=True, output_attentions=True)
    expected = run(theirs, images, noise=noise, **everything)
    ours = mae_jax.load(saved(theirs, tmp_path_factory.mktemp("theirs")))
    found = jax.jit(functools.partial(ours, **everything))(images, noise=noise)
    return ours, found, theirs, expected


def test_loss_and_predictions_of_an_autoencoder_are_those_of_transformers(both):
    _, found, _, expected = both
    assert max_relative(found.loss, expected.loss) < TOLERANCE
    assert max_relative(found.prediction, expected.logits) < TOLERANCE
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.ids_restore, expected.ids_restore)


def test_hidden_states_are_those_of_transformers(both):
    _, found, _, expected = both
    assert len(found.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert max_relative(ours, theirs) < TOLERANCE


def test_attentions_are_those_of_transformers(both):
    _, found, _, expected = both
    assert len(found.attentions) == len(expected.attentions)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert max_relative(ours, theirs) < TOLERANCE


def test_the_decoders_hidden_states_and_attentions_are_those_of_transformers(both):
    _, found, theirs, expected = both
    states, attentions, hooks = [], [], []
    for layer in theirs.decoder.decoder_layers:
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])))
        hooks.append(layer.attention.register_forward_hook(lambda _, inputs, output: attentions.append(output[1])))
    hooks.append(theirs.decoder.decoder_norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])))
    run(theirs.decoder, theirs.vit.layernorm(expected.hidden_states[-1]), ids_restore=expected.ids_restore)
    for hook in hooks:
        hook.remove()
    assert (len(states), len(attentions)) == (len(found.decoder_hidden_states), len(found.decoder_attentions))
    for ours, their in zip(
        [*found.decoder_hidden_states, *found.decoder_attentions], [*states, *attentions], strict=True
    ):
        assert max_relative(ours, their) < TOLERANCE


@pytest.mark.parametrize("larger", [(0, 0), (3, 1)])
def test_features_at_the_models_size_and_at_others_are_those_of_transformers(both, larger):
    ours, _, theirs, _ = both
    config = theirs.config
    size = tuple(config.image_size + config.patch_size * more for more in larger)
    images = pictures(theirs, 2, size)
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    num_patches = size[0] * size[1] // config.patch_size**2
    expected = run(theirs.vit, images, noise=in_order(num_patches, 2), interpolate_pos_encoding=larger != (0, 0))
    config.mask_ratio = ratio
    assert max_relative(jax.jit(ours.encode)(images), expected.last_hidden_state) < TOLERANCE


def test_a_bare_encoder_of_an_autoencoder_gives_the_masked_features_of_transformers(tmp_path):
    theirs = create("ViTMAEModel", **AUTOENCODER)
    images, noise = pictures(theirs), np.random.default_rng(1).random((2, 16), np.float32)
    expected = run(theirs, images, noise=noise)
    ours = mae_jax.load(saved(theirs, tmp_path))
    found = jax.jit(functools.partial(ours.encode, output_masks=True))(images, noise=noise)
    assert max_relative(found.features, expected.last_hidden_state) < TOLERANCE
    np.testing.assert_array_equal(found.mask, expected.mask)
    np.testing.assert_array_equal(found.ids_restore, expected.ids_restore)


def test_a_vit_gives_the_features_of_transformers_at_its_size_and_at_others(tmp_path):
    theirs = create("ViTModel", **ENCODER)
    ours = mae_jax.load(saved(theirs, tmp_path))
    for size in ((20, 20), (35, 15)):
        images = pictures(theirs, 2, size)
        expected = run(theirs, images, interpolate_pos_encoding=size != (20, 20), output_hidden_states=True)
        found = jax.jit(functools.partial(ours.encode, output_hidden_states=True))(images)
        assert max_relative(found.features, expected.last_hidden_state) < TOLERANCE
        # Its last hidden state is the normed one.
        for a, b in zip(found.hidden_states[:-1], expected.hidden_states[:-1], strict=True):
            assert max_relative(a, b) < TOLERANCE


def test_a_vit_of_images_that_are_not_square_gives_the_features_of_transformers(tmp_path):
    theirs = create("ViTModel", **ENCODER | dict(image_size=(10, 20)))
    images = pictures(theirs)
    ours = mae_jax.load(saved(theirs, tmp_path))
    assert ours.config.image_size == (10, 20)
    assert max_relative(jax.jit(ours.encode)(images), run(theirs, images).last_hidden_state) < TOLERANCE


@pytest.mark.parametrize(
    "architecture, pool, settings",
    [("ViTForImageClassification", "class", {}), ("BeitForImageClassification", "mean_norm", BEIT)],
)
def test_a_classifier_gives_the_logits_of_transformers(tmp_path, architecture, pool, settings):
    theirs = create(architecture, **ENCODER, **settings, num_labels=7)
    images = pictures(theirs, 4)
    ours = mae_jax.load(saved(theirs, tmp_path))
    assert ours.config.pool == pool
    assert max_relative(jax.jit(ours.__call__)(images), run(theirs, images).logits) < TOLERANCE


def test_every_activation_of_transformers_is_the_same_function_here_or_is_refused():
    torch, activations = pytest.importorskip("torch"), pytest.importorskip("transformers").activations
    x, same = np.linspace(-9, 9, 2001, dtype=np.float32), set()
    for name in activations.ACT2CLS:
        ours = read_settings({"model_type": "vit", "hidden_act": name})["activation"]
        if ours in ACTIVATIONS:
            expected = activations.ACT2FN[name](torch.tensor(x)).numpy()
            # A few roundings of the largest value, 9.
            np.testing.assert_allclose(ACTIVATIONS[ours](jnp.array(x)), expected, rtol=1e-6, atol=2e-6, err_msg=name)
            same.add(name)
    assert same >= {"gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "silu", "swish"}


@pytest.mark.parametrize("side, width", [(14, 768), (14, 1024), (16, 1280), (14, 512), (16, 512)])
def test_a_table_that_transformers_computes_is_the_formulas_to_the_last_bit(side, width):
    # Or a model that has it would be taken to have learned its positions.
    module = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    table = module.build_2d_sinusoidal_position_embedding(side, side, width, cls_token=True).numpy()
    table = np.concatenate([table[:, width // 2 :], table[:, : width // 2]], axis=1)  # as its model does
    np.testing.assert_array_equal(table, sincos_table((side, side), width))


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(model, its folder as transformers writes it, the parameters that are read from it)."""
    model = create("ViTMAEForPreTraining", **AUTOENCODER)
    folder = saved(model, tmp_path_factory.mktemp("original"))
    return model, folder, params_of(folder)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_settings_are_those_of_the_config_json(original):
    model = read_weights(original[1]).config["model"]
    expected = dict(
        width=24, depth=2, num_heads=12, mlp_width=40, image_size=(20, 20), patch_size=5, channels=3,
        norm_epsilon=1e-6, activation="gelu", qkv_bias=True, positions="learned", decoder_width=16, decoder_depth=1,
        decoder_num_heads=16, decoder_mlp_width=30, mask_ratio=0.6, normalize_targets=True,
    )  # fmt: skip
    assert {name: model[name] for name in expected} == expected


def test_transformers_itself_writes_a_spelling_of_its_own(original):
    # If this fails, transformers has changed: the test of the spellings below must get another one.
    names = safetensors.numpy.load_file(original[1] / "model.safetensors")
    assert "decoder.decoder_encoder.layer.0.attention.attention.query.weight" in names
    assert "vit.encoder.layer.0.attention.attention.query.weight" in names


@pytest.mark.parametrize("wrapper", ["vit.", "", "module.vit.", "model.vit."])
@pytest.mark.parametrize("spelling", ["in memory", "transformers 4", "transformers 5"])
def test_every_spelling_of_the_names_loads_to_the_same_bits(original, tmp_path, spelling, wrapper):
    model, folder, params = original
    state = state_of(model)
    if spelling == "transformers 5":
        state = safetensors.numpy.load_file(folder / "model.safetensors")
    if spelling == "transformers 4":
        state = respelled(state)
        assert "decoder.decoder_layers.0.attention.attention.query.weight" in state
    state = {name.replace("vit.", wrapper, 1): value for name, value in state.items()}
    if wrapper.startswith("mod"):
        outer = wrapper.removesuffix("vit.")
        state = {name if name.startswith(outer) else outer + name: value for name, value in state.items()}
    path = save_safetensors(tmp_path / "model.safetensors", state, config_of(folder))
    check_same_params(params_of(path.parent), params)
    check_same_params(params_of(path), params)


def test_shards_load_to_the_same_bits(original, tmp_path):
    model, _, params = original
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_same_params(params_of(tmp_path), params)


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_files_load_to_the_same_bits(original, tmp_path, shards):
    model, folder, params = original
    state = respelled(state_of(model))
    (tmp_path / "config.json").write_text(json.dumps(config_of(folder)))
    if shards == 1:
        save_torch(tmp_path / "pytorch_model.bin", state)
    else:
        files = [f"pytorch_model-{n:05}-of-{shards:05}.bin" for n in range(1, shards + 1)]
        places = {name: files[n % shards] for n, name in enumerate(state)}
        for file in files:
            save_torch(tmp_path / file, {name: state[name] for name in state if places[name] == file})
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    check_same_params(params_of(tmp_path), params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_values_of_another_precision_are_those_values_in_float32(original, tmp_path, dtype):
    torch = pytest.importorskip("torch")
    model, folder, _ = original
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    save_torch(tmp_path / "pytorch_model.bin", cast)
    (tmp_path / "config.json").write_text(json.dumps(config_of(folder)))
    expected = save_safetensors(
        tmp_path / "expected" / "model.safetensors",
        {name: tensor.to(torch.float32).numpy() for name, tensor in cast.items()},
        config_of(folder),
    )
    check_same_params(params_of(tmp_path), params_of(expected))


def test_half_precision_that_transformers_saves_loads(original, tmp_path):
    torch = pytest.importorskip("torch")
    model = create("ViTMAEForPreTraining", **AUTOENCODER).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = jax.tree.leaves(params_of(tmp_path))
    for half, full in zip(found, jax.tree.leaves(original[2]), strict=True):
        assert half.dtype == np.float32
        np.testing.assert_allclose(half, full, rtol=2**-8, atol=0)  # 8 bits of bfloat16's significand


def test_without_a_config_json_the_shapes_tell_the_settings_and_heads_are_asked_for(original, tmp_path):
    _, folder, params = original
    (tmp_path / "a.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="num_heads=") as error:
        mae_jax.load(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)
    asked = dict(num_heads=12, decoder_num_heads=16, normalize_targets=True, norm_epsilon=1e-6)
    found = read_weights(tmp_path / "a.safetensors", asked)
    check_same_params(found.params, params)
    expected = read_weights(folder).config["model"]
    assert found.config["model"] == expected | {"mask_ratio": 0.75}
    assert not any("assumed" in note for note in found.notes)


def test_a_model_of_a_hugging_face_file_has_its_epsilon_of_1e_12_where_nothing_says_another(original, tmp_path):
    (tmp_path / "a.safetensors").write_bytes((original[1] / "model.safetensors").read_bytes())
    assert read_weights(tmp_path / "a.safetensors", {"num_heads": 12}).config["model"]["norm_epsilon"] == 1e-12
    config = {k: v for k, v in config_of(original[1]).items() if k != "layer_norm_eps"}  # the default is left out
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_weights(tmp_path / "a.safetensors").config["model"]["norm_epsilon"] == 1e-12


def test_mean_and_std_of_the_image_processor_are_the_models(original, tmp_path):
    transformers = pytest.importorskip("transformers")
    _, folder, _ = original
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert read_weights(tmp_path).config["data"]["mean"] == (0.485, 0.456, 0.406)  # ImageNet's, if nothing says others
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], size=20)
    processor.save_pretrained(tmp_path)
    model = mae_jax.load(tmp_path)
    assert (model.processor.mean, model.processor.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    picture = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    expected = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    # Without a crop neither resizes a picture of this size: two roundings of numbers up to 3.
    uncropped = dataclasses.replace(model.processor, eval_crop=1.0)
    np.testing.assert_allclose(uncropped(picture)[0], expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_vit_base_is_that_of_transformers(tmp_path):
    theirs = create("ViTMAEForPreTraining")
    images, noise = pictures(theirs, 1), np.random.default_rng(1).random((1, 196), np.float32)
    expected = run(theirs, images, noise=noise)
    graphdef, state = nnx.split(mae_jax.load(saved(theirs, tmp_path)))  # 450 MB are no constants to compile
    found = jax.jit(lambda state: nnx.merge(graphdef, state)(images, noise=noise))(state)
    assert max_relative(found.loss, expected.loss) < TOLERANCE
    assert max_relative(found.prediction, expected.logits) < TOLERANCE
