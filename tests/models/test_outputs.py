"""What a model gives besides its result: hidden states, attention maps, masks, pictures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_jax.data.processor import Processor
from mae_jax.models.classifier import ClassifierConfig, init_classifier, make_bind_classifier
from mae_jax.models.encoder import Encoder
from mae_jax.models.mae import MAEConfig, make_bind
from mae_jax.models.patches import patchify
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError
from tests.reference import max_relative, random_batch, random_like, random_params

CONFIG = MAEConfig((12, 16), 4, 3, 16, 3, 2, 4.0, 12, 2, 3, 0.5, normalize_targets=False)  # 12 patches, 6 visible
IMAGES, NOISE = random_batch(CONFIG, 2)
EVERYTHING = dict(output_hidden_states=True, output_attentions=True)


@functools.cache
def make_model(config=CONFIG, decoder=True):
    params = random_params(config)
    return make_bind(config, decoder=decoder)(params if decoder else {"encoder": params["encoder"]})


def test_hidden_states_are_the_embeddings_and_what_each_block_returns():
    model, params = make_model(), random_params(CONFIG)
    found = model.encode(IMAGES, output_hidden_states=True).hidden_states
    assert found.shape == (4, 2, 13, 16)
    for depth in (1, 2):  # the first blocks alone are a shallower model
        shallow = dataclasses.replace(CONFIG, depth=depth)
        encoder = params["encoder"] | {"blocks": jax.tree.map(lambda x, d=depth: x[:d], params["encoder"]["blocks"])}
        features = make_bind(shallow)(params | {"encoder": encoder}).encode(IMAGES)
        assert max_relative(model.encoder.norm(found[depth]), features) < 1e-6
    assert max_relative(model.encoder.norm(found[3]), model.encode(IMAGES)) < 1e-6
    embed = params["encoder"]["patch_embed"]
    patches = np.asarray(patchify(IMAGES, 4)) @ embed["kernel"] + embed["bias"] + sincos_table((3, 4), 16)[1:]
    np.testing.assert_allclose(found[0][:, 1:], patches, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[0][:, 0], np.repeat(params["encoder"]["class_token"][0], 2, axis=0))


def test_attention_maps_are_the_softmax_of_queries_and_keys_of_each_block():
    model, params = make_model(), random_params(CONFIG)
    out = model.encode(IMAGES, **EVERYTHING)
    assert out.attentions.shape == (3, 2, 2, 13, 13)
    np.testing.assert_allclose(np.sum(out.attentions, axis=-1), 1, rtol=0, atol=1e-6)
    for block in range(3):
        x = np.asarray(out.hidden_states[block], np.float64)
        p = jax.tree.map(lambda leaf, b=block: np.asarray(leaf[b], np.float64), params["encoder"]["blocks"])
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * p["norm1"]["scale"] + p["norm1"]["bias"]
        qkv = p["attention"]["qkv"]
        q, k = (x @ qkv["kernel"][:, part] + qkv["bias"][part] for part in range(2))
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            weights = np.exp(np.einsum("bqd,bkd->bqk", q[..., part], k[..., part]) / np.sqrt(8))
            expected = weights / weights.sum(-1, keepdims=True)
            np.testing.assert_allclose(out.attentions[block][:, head], expected, rtol=0, atol=1e-5)


def test_asking_for_more_does_not_change_a_bit_of_the_result():
    model = make_model()
    np.testing.assert_array_equal(model.encode(IMAGES), model.encode(IMAGES, **EVERYTHING).features)
    plain, full = model(IMAGES, noise=NOISE), model(IMAGES, noise=NOISE, **EVERYTHING)
    for name in ("loss", "prediction", "mask", "ids_restore"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(full, name))
    assert plain.hidden_states is plain.attentions is plain.decoder_hidden_states is plain.decoder_attentions is None
    assert full.hidden_states.shape == (4, 2, 7, 16) and full.attentions.shape == (3, 2, 2, 7, 7)
    assert full.decoder_hidden_states.shape == (3, 2, 13, 12) and full.decoder_attentions.shape == (2, 2, 3, 13, 13)


@pytest.mark.parametrize("request_", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_what_is_not_asked_for_is_not_computed(request_):
    model = make_model()
    program = str(jax.make_jaxpr(lambda x: model.encode(x, **request_))(jnp.asarray(IMAGES)))
    assert ("f32[3,2,13,16]" in program) == ("output_hidden_states" in request_)  # stacked by the scan over 3 blocks
    assert ("f32[3,2,2,13,13]" in program) == ("output_attentions" in request_)


def test_frozen_blocks_and_recomputation_give_the_same_hidden_states_and_maps():
    params = random_params(CONFIG)["encoder"]
    expected = make_model().encode(IMAGES, **EVERYTHING)
    for config, frozen in ((CONFIG, 2), (CONFIG, 3), (dataclasses.replace(CONFIG, remat=True), 0)):

        def create(config=config, frozen=frozen):
            return Encoder(config, rngs=nnx.Rngs(0), frozen_blocks=frozen)

        encoder = nnx.merge(nnx.split(nnx.eval_shape(create))[0], params)
        features, recorded = encoder(patchify(IMAGES, 4), (3, 4), record=(True, True))
        np.testing.assert_allclose(features, expected.features, rtol=0, atol=1e-6)
        np.testing.assert_allclose(recorded[0], expected.hidden_states, rtol=0, atol=1e-5)
        np.testing.assert_allclose(recorded[1], expected.attentions, rtol=0, atol=1e-6)


def test_encoding_with_a_key_sees_the_patches_that_the_autoencoder_sees():
    model, key = make_model(), jax.random.key(3)
    out, encoded = model(IMAGES, key=key, mask_ratio=0.25), model.encode(IMAGES, key, 0.25, output_masks=True)
    assert encoded.features.shape == (2, 10, 16)
    np.testing.assert_array_equal(encoded.mask, out.mask)
    np.testing.assert_array_equal(encoded.ids_restore, out.ids_restore)
    np.testing.assert_array_equal(encoded.features, model.encode(IMAGES, key, 0.25))
    hidden = np.repeat(np.repeat(np.asarray(out.mask).reshape(2, 3, 4, 1), 4, axis=1), 4, axis=2)
    np.testing.assert_array_equal(model.encode(np.where(hidden, 9.0, IMAGES), key, 0.25), encoded.features)
    np.testing.assert_array_equal(model.encode(IMAGES, noise=NOISE).shape, (2, 7, 16))  # the model's own ratio


@pytest.mark.parametrize("arguments", [{"mask_ratio": 0.5}, {"output_masks": True}])
def test_a_mask_without_a_key_is_refused(arguments):
    with pytest.raises(ValueError, match="give one of key=, noise= and mask="):
        make_model().encode(IMAGES, **arguments)


def test_a_model_works_inside_jit_vmap_and_grad_and_as_their_argument():
    model, key = make_model(), jax.random.key(0)
    expected = model.encode(IMAGES)
    compiled = jax.jit(lambda model, images: model.encode(images))(model, IMAGES)
    assert max_relative(compiled, expected) < 1e-6
    assert max_relative(jax.jit(model.encode)(IMAGES), expected) < 1e-6
    assert (
        max_relative(jax.jit(jax.vmap(lambda image: model.encode(image[None])[0]))(jnp.asarray(IMAGES)), expected)
        < 1e-6
    )
    loss, grads = jax.jit(jax.value_and_grad(lambda model: model(IMAGES, key=key).loss))(model)
    assert max_relative(loss, model(IMAGES, key=key).loss) < 1e-6
    assert type(grads) is type(model) and all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))
    images = jnp.asarray(IMAGES)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(model.encode(x)[:, 0])))(images)
    assert slope.shape == IMAGES.shape and np.all(np.isfinite(slope)) and np.any(slope != 0)


def test_learned_positions_are_used_as_they_are_and_resized_for_other_images():
    config = dataclasses.replace(CONFIG, positions="learned")
    params = random_params(config)
    assert params["encoder"]["positions"].shape == (13, 16) and params["decoder"]["positions"].shape == (13, 12)
    model = make_bind(config)(params)
    tables = {"encoder": sincos_table((3, 4), 16), "decoder": sincos_table((3, 4), 12)}
    fixed = {part: params[part] | {"positions": table} for part, table in tables.items()}
    plain = {part: {k: v for k, v in tree.items() if k != "positions"} for part, tree in params.items()}
    sincos = make_bind(CONFIG)(plain)
    np.testing.assert_array_equal(
        make_bind(config)(fixed)(IMAGES, noise=NOISE).prediction, sincos(IMAGES, noise=NOISE).prediction
    )
    assert max_relative(model(IMAGES, noise=NOISE).prediction, sincos(IMAGES, noise=NOISE).prediction) > 0.01
    torch = pytest.importorskip("torch")
    table = torch.tensor(params["encoder"]["positions"])
    grid = table[1:].reshape(1, 3, 4, 16).permute(0, 3, 1, 2)
    wide = torch.nn.functional.interpolate(grid, size=(2, 5), mode="bicubic", align_corners=False)
    wide = torch.cat([table[:1], wide.permute(0, 2, 3, 1).reshape(10, 16)]).numpy()
    other = dataclasses.replace(config, image_size=(8, 20))
    decoder = params["decoder"] | {"positions": sincos_table((2, 5), 12)}
    resized = make_bind(other)({"encoder": params["encoder"] | {"positions": wide}, "decoder": decoder})
    images = np.random.default_rng(1).standard_normal((2, 8, 20, 3)).astype(np.float32)
    assert max_relative(model.encode(images), resized.encode(images)) < 1e-5
    assert model(images, key=jax.random.key(0)).prediction.shape == (2, 10, 48)


def test_a_classifier_resizes_its_positions_too():
    config = ClassifierConfig(CONFIG, 5)
    params = random_like(jax.eval_shape(lambda key: init_classifier(config, key)[0], jax.random.key(0)))
    model = make_bind_classifier(config)(params)
    assert model(np.zeros((2, 8, 20, 3), np.float32)).shape == (2, 5)
    out = model.encode(IMAGES, **EVERYTHING)
    np.testing.assert_array_equal(out.features, model.encode(IMAGES))
    assert out.hidden_states.shape == (4, 2, 13, 16) and out.attentions.shape == (3, 2, 2, 13, 13)


# -------------------------------------------------------------------------------------------- pictures and patches


def test_patches_can_be_cut_and_put_together_at_any_size():
    model = make_model()
    for images in (IMAGES, np.random.default_rng(0).random((1, 8, 20, 3)).astype(np.float32)):
        patches = model.patchify(images)
        np.testing.assert_array_equal(model.unpatchify(patches, images.shape[1:3]), images)
    np.testing.assert_array_equal(model.unpatchify(model.patchify(IMAGES)), IMAGES)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_reconstruction_shows_the_visible_patches_and_predicts_the_hidden_ones(normalize):
    config = dataclasses.replace(CONFIG, normalize_targets=normalize)
    model = make_bind(config)(random_params(config))
    model.processor = Processor((12, 16), 3, (0.5,), (0.25,))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 12, 16, 3), np.uint8)
    images = (pictures / 255 - 0.5).astype(np.float32) / np.float32(0.25)
    found = np.asarray(model.reconstruct(images, noise=NOISE))
    assert found.dtype == np.uint8 and found.shape == pictures.shape
    out = model(images, noise=NOISE)
    hidden = np.repeat(np.repeat(np.asarray(out.mask).reshape(2, 3, 4), 4, axis=1), 4, axis=2) == 1
    np.testing.assert_array_equal(found[~hidden], pictures[~hidden])
    predicted = np.asarray(out.prediction)
    if normalize:
        patches = np.asarray(patchify(images, 4))
        std = np.sqrt(patches.var(-1, ddof=1, keepdims=True) + 1e-6)
        predicted = predicted * std + patches.mean(-1, keepdims=True)
    predicted = np.asarray(model.unpatchify(predicted))
    expected = np.clip(predicted * 0.25 + 0.5, 0, 1) * 255
    assert np.abs(found[hidden] - expected[hidden]).max() <= 0.501  # rounded to whole numbers
    everywhere = np.asarray(model.reconstruct(images, noise=NOISE, paste_visible=False))
    assert np.abs(everywhere - expected).max() <= 0.501


def test_a_reconstruction_without_a_key_is_always_the_same():
    model = make_bind(CONFIG)(random_params(CONFIG))
    with pytest.raises(UserError, match="no processor"):
        model.reconstruct(IMAGES)
    model.processor = Processor((12, 16), 3)
    np.testing.assert_array_equal(model.reconstruct(IMAGES), model.reconstruct(IMAGES, jax.random.key(0)))
    assert not np.array_equal(model.reconstruct(IMAGES), model.reconstruct(IMAGES, jax.random.key(1)))


def test_a_model_without_a_decoder_encodes_and_says_why_it_does_not_reconstruct():
    model = make_model(decoder=False)
    np.testing.assert_array_equal(model.encode(IMAGES), make_model().encode(IMAGES))
    for use in (lambda: model(IMAGES, noise=NOISE), lambda: model.reconstruct(IMAGES)):
        with pytest.raises(UserError, match="no decoder|no processor") as error:
            use()
        assert "\n" not in str(error.value)


def test_pictures_that_were_not_normalised_are_refused_in_one_line():
    with pytest.raises(UserError, match="images of type uint8: the model takes normalised floats"):
        make_model().encode(np.zeros((2, 12, 16, 3), np.uint8))


def test_a_config_with_another_width_has_mlps_to_match():
    wider = dataclasses.replace(CONFIG, width=32)
    assert (CONFIG.blocks.mlp_width, wider.blocks.mlp_width) == (64, 128)
    assert dataclasses.replace(CONFIG, mlp_ratio=2.0).decoder_blocks.mlp_width == 24
    assert dataclasses.replace(wider, mlp_width=50).blocks.mlp_width == 50
