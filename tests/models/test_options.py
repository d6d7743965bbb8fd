"""What each option of the model changes, and what it leaves alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.evaluation.evaluator import pool
from mae_jax.models.classifier import ClassifierConfig, init_classifier, make_bind_classifier
from mae_jax.models.mae import PREDICTED, MAEConfig, init_params, make_bind
from mae_jax.models.masking import BLOCK_DRAWS, some_hidden
from mae_jax.models.patches import patchify
from mae_jax.runtime.errors import UserError
from tests.reference import drawn_masks, max_relative, random_batch, random_like, random_params

PLAIN = MAEConfig((12, 16), 4, 1, 16, 2, 2, 2.0, 12, 2, 3, 0.5, False)  # 3 x 4 patches, 6 of them hidden
GRID = 3, 4


def config_of(**options):
    return dataclasses.replace(PLAIN, **options)


@functools.cache
def model_of(**options):
    return make_bind(config_of(**options))(random_params(config_of(**options)))


def images(seed=0):
    return random_batch(PLAIN, 2, seed)[0]


# ------------------------------------------------------------------------------------- mask tokens in the encoder


def test_an_encoder_with_mask_tokens_sees_the_places_of_hidden_patches_but_not_their_pixels():
    mask = np.arange(12) % 2
    hidden = mask.reshape(GRID).repeat(4, 0).repeat(4, 1)[None, ..., None] > 0
    for sees, options in ((True, {"encoder_mask_tokens": True}), (False, {})):
        config = config_of(positions="learned", **options)
        params, bind = random_params(config), make_bind(config)
        moved = jax.tree.map(np.copy, params)
        moved["encoder"]["positions"][1 + 5] += np.arange(16) % 3  # the place of a hidden patch

        @jax.jit
        def run(params, images, bind=bind):
            output = bind(params)(images, mask=mask, output_hidden_states=True)
            return output.prediction, output.hidden_states[-1]

        prediction, states = run(params, images())
        assert states.shape == (2, 13 if sees else 7, 16)
        np.testing.assert_array_equal(prediction, run(params, np.where(hidden, images(1), images()))[0])
        assert np.min(np.ptp(run(params, np.where(hidden, images(), images(1)))[0] - prediction, axis=-1)) > 1e-3
        changes = np.abs(run(moved, images())[1] - states).max((0, 2))
        visible = changes[1:][mask == 0] if sees else changes[1:]
        assert visible.min() > 1e-3 if sees else visible.max() == 0


def test_the_features_of_an_encoder_that_was_trained_with_mask_tokens_leave_hidden_patches_out():
    model = model_of(encoder_mask_tokens=True)
    assert model.encode(images()).shape == (2, 13, 16)
    assert model.encode(images(), jax.random.key(0)).shape == (2, 7, 16)


# ------------------------------------------------------------------------------------------ class tokens, registers


def test_features_have_the_class_tokens_first_and_no_registers_which_work_all_the_same():
    config = config_of(class_tokens=3, registers=2)
    params = random_params(config)
    out = make_bind(config)(params).encode(images(), output_hidden_states=True, output_attentions=True)
    assert out.features.shape == (2, 3 + 12, 16)
    assert out.hidden_states.shape == (3, 2, 3 + 2 + 12, 16) and out.attentions.shape == (2, 2, 2, 17, 17)
    encoder = params["encoder"]
    assert encoder["class_token"].shape == (1, 3, 16) and encoder["registers"].shape == (1, 2, 16)
    np.testing.assert_array_equal(out.hidden_states[0][1, :5], [*encoder["class_token"][0], *encoder["registers"][0]])
    kept = np.asarray(out.hidden_states[-1])[:, [0, 1, 2, *range(5, 17)]]
    np.testing.assert_array_equal(out.features, make_bind(config)(params).encoder.norm(kept))
    other = params | {"encoder": encoder | {"registers": encoder["registers"][..., ::-1]}}
    changes = np.abs(make_bind(config)(other).encode(images()) - out.features).max((0, 2))
    assert changes.min() > 1e-4


def test_class_tokens_and_registers_begin_apart_from_one_another_and_small():
    init = functools.partial(init_params, config_of(class_tokens=8, registers=8))
    encoder = jax.jit(init)(jax.random.key(0))["encoder"]
    tokens = np.concatenate([encoder["class_token"][0], encoder["registers"][0]])
    assert abs(tokens.std() / 0.02 - 1) < 0.2  # of 256 values it scatters by 4.4 %
    assert np.abs(np.corrcoef(tokens) - np.eye(16)).max() < 0.9


def test_a_class_feature_is_the_mean_of_the_class_tokens_and_a_mean_feature_that_of_the_others():
    tokens = np.random.default_rng(0).normal(size=(2, 7, 4)).astype(np.float32)
    np.testing.assert_allclose(pool(tokens, "class", 3), tokens[:, :3].mean(1), rtol=0, atol=1e-6)
    np.testing.assert_allclose(pool(tokens, "mean", 3), tokens[:, 3:].mean(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["class", "mean", "mean_norm", "attentive", "abmilp"])
def test_a_classifiers_pools_tell_class_tokens_from_patches_and_see_no_registers(name):
    config = ClassifierConfig(config_of(class_tokens=3, registers=2), 4, pool=name)
    params = random_like(jax.eval_shape(lambda: init_classifier(config, jax.random.key(0))[0]))
    model = make_bind_classifier(config)(params)
    found = model.represent(images())
    tokens, _ = model.encoder(patchify(images(), 4), GRID, norm=False)
    normed, width = np.asarray(model.encoder.norm(tokens)), np.asarray(tokens)
    expected = {
        "class": normed[:, :3].mean(1), "mean": normed[:, 3:].mean(1), "mean_norm": width[:, 3:].mean(1),
        "attentive": normed[:, 3:], "abmilp": normed[:, 3:],
    }  # fmt: skip
    np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-5)
    assert model(images()).shape == (2, 4)


def test_the_tokens_after_chosen_blocks_have_no_registers_and_are_the_normed_hidden_states():
    config = config_of(class_tokens=3, registers=2)
    model = make_bind(config)(random_like(jax.eval_shape(lambda: init_params(config, jax.random.key(0)))))
    found = model.encode(images(), layers=range(1, config.depth + 1))
    states = model.encode(images(), output_hidden_states=True).hidden_states[1:]
    states = np.delete(states, (3, 4), axis=2)  # the registers
    for ours, state in zip(found, states, strict=True):
        np.testing.assert_allclose(ours, model.encoder.norm(state), rtol=0, atol=1e-5)


# --------------------------------------------------------------------------------------- normed queries and keys


def scaled_queries(params: dict, factor: float) -> dict:
    """Parameters whose encoder's queries, not the keys and values, are longer."""
    params = jax.tree.map(np.copy, params)
    for name in ("kernel", "bias"):
        params["encoder"]["blocks"]["attention"]["qkv"][name][..., 0, :] *= factor
    return params


def test_the_length_of_a_query_does_not_matter_once_it_is_normed():
    for normed in (True, False):
        config = config_of(qk_norm=normed)
        bind, params = make_bind(config), random_params(config)
        encode = jax.jit(lambda params, bind=bind: bind(params).encode(images()))
        change = max_relative(encode(scaled_queries(params, 30.0)), encode(params))
        # The norm's epsilon is 1e-6 of a variance around 1.
        assert change < 1e-4 if normed else change > 0.1


def test_queries_and_keys_are_normed_in_float32_also_for_products_of_bfloat16():
    config = config_of(qk_norm=True)
    params = random_params(config)
    found, expected = (
        make_bind(dataclasses.replace(config, dtype=dtype))(params).encode(images(), output_attentions=True)
        for dtype in ("bfloat16", "float32")
    )
    assert found.features.dtype == jnp.float32 and np.isfinite(found.features).all()
    assert max_relative(found.features, expected.features) < 0.05  # eight bits of each product
    assert np.abs(found.attentions - expected.attentions).max() < 0.05


# -------------------------------------------------------------------------------------------------- cross-attention


def test_what_a_cross_decoder_predicts_of_a_patch_does_not_depend_on_what_else_it_predicts():
    model = model_of(decoder_attention="cross", class_tokens=2)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 16)), jnp.float32)
    everything, _ = model.decoder(tokens, GRID, None)
    ids = jnp.asarray([[7, 2, 11], [0, 5, 4]])
    some, _ = model.decoder(tokens, GRID, None, ids=ids)
    # The same numbers in matrix products of another shape.
    np.testing.assert_allclose(some, np.take_along_axis(everything, ids[..., None], 1), rtol=0, atol=1e-5)


@functools.cache
def losses_of_keys(count, **options):
    """Training losses of one image under `count` keys."""
    bind, params = make_bind(config_of(**options)), random_params(config_of(**options))
    keys, image = jax.random.split(jax.random.key(0), count), images()[:1]
    run = jax.jit(jax.vmap(lambda key: bind(params).training_loss(image, key[None])[0]))
    return np.asarray(run(keys), np.float64)


def test_the_loss_of_some_hidden_patches_is_in_the_mean_that_of_all_of_them():
    some = losses_of_keys(500, decoder_attention="cross", prediction_ratio=0.25)
    all_hidden = losses_of_keys(500, decoder_attention="cross")
    difference = some - all_hidden  # with the same masks
    assert difference.std() > 0.01 and abs(difference.mean()) < 4.5 * difference.std() / math.sqrt(500)


def test_a_training_step_predicts_the_stated_share_of_all_patches_all_of_them_hidden():
    config = config_of(decoder_attention="cross", prediction_ratio=0.3)
    model, keys = make_bind(config)(random_params(config)), jax.random.split(jax.random.key(0), 5)
    masks = drawn_masks(keys, GRID, 0.5)
    ids = some_hidden(keys, masks, config.num_predicted(GRID))
    assert ids.shape == (5, int(12 * 0.3)) and np.take_along_axis(masks.mask, ids, 1).all()
    assert "f32[2,3,16]" in str(jax.make_jaxpr(model.training_loss)(images(), keys[:2]))  # predicted, of 12 patches


@pytest.mark.parametrize("sampling", ["random", "block"])
def test_the_patches_that_are_predicted_have_nothing_to_do_with_how_the_mask_was_drawn(sampling):
    # `split` and `fold_in` derive the same keys from a key: those of a mask's own draws must not be used once more.
    draws = [jax.random.fold_in(jax.random.key(0), n) for n in range(BLOCK_DRAWS)]
    data = np.stack([jax.random.key_data(key) for key in draws])
    own = jax.random.key_data(jax.random.fold_in(jax.random.key(0), PREDICTED))
    assert not (data == np.asarray(own)).all(1).any()

    def draw(keys):
        masks = drawn_masks(keys, (6, 6), 0.5, sampling)
        ids = some_hidden(jax.vmap(jax.random.fold_in, (0, None))(keys, PREDICTED), masks, 6)
        second = jax.vmap(lambda key: jax.random.uniform(jax.random.split(jax.random.fold_in(key, 1), 4)[1]))(keys)
        return jnp.any(ids == masks.ids_hidden[:, :1], axis=1), second

    first_is_predicted, uniform = jax.device_get(jax.jit(draw)(jax.random.split(jax.random.key(1), 4000)))
    assert abs(first_is_predicted.mean() - 1 / 3) < 4.5 * math.sqrt(2 / 9 / 4000)
    assert abs(np.corrcoef(first_is_predicted, uniform)[0, 1]) < 4.5 / math.sqrt(4000)


# -------------------------------------------------------------------------------------------------- masks per image


def test_the_loss_of_several_masks_is_the_mean_of_the_losses_of_each_under_its_own_key():
    keys = jax.random.split(jax.random.key(3), 2)
    params, batch = random_params(PLAIN), images()
    found, parts = make_bind(config_of(masks_per_image=3))(params).training_loss(batch, keys)
    each = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
    single = jax.jit(lambda keys: make_bind(PLAIN)(params).training_loss(batch, keys)[0])
    losses = [float(single(each[:, mask])) for mask in range(3)]
    assert len(set(losses)) == 3 and parts == {}
    assert float(found) == pytest.approx(np.mean(losses), rel=1e-6)


# -------------------------------------------------------------------------------------------------------- mistakes

REFUSED = {
    "mask_sampling": (dict(mask_sampling="blocks"), "model.mask_sampling='blocks' is not one of random, grid, block"),
    "loss_patches": (dict(loss_patches="visible"), "model.loss_patches='visible' is not one of hidden, all"),
    "decoder_attention": (dict(decoder_attention="both"), "model.decoder_attention='both' is not one of self, cross"),
    "class_tokens": (dict(class_tokens=0), r"model.class_tokens=0 is outside \[1, 1024\]"),
    "registers": (dict(registers=-1), r"model.registers=-1 is outside \[0, 1024\]"),
    "mask_cell": (dict(mask_cell=0), r"model.mask_cell=0 is outside \[1, "),
    "masks_per_image": (dict(masks_per_image=0), r"model.masks_per_image=0 is outside \[1, "),
    "uniformity": (dict(uniformity=-0.1), r"model.uniformity=-0.1 is outside \[0, inf\]"),
    "uniformity nan": (dict(uniformity=math.nan), r"model.uniformity=nan is outside \[0, inf\]"),
    "cells and grid": (
        dict(mask_cell=2, mask_sampling="block", image_size=16),
        "model.mask_cell=2 is for model.mask_sampling=random, not block",
    ),
    "cells of another grid": (dict(mask_cell=2), "model.mask_cell=2 does not divide the grid of 3 x 4 patches"),
    "larger cells": (dict(mask_cell=4), "model.mask_cell=4 does not divide the grid of 3 x 4 patches"),
    "grid's ratio": (
        dict(mask_sampling="grid", image_size=16),
        r"model.mask_sampling=grid .* needs model.mask_ratio=0.75, not 0.5",
    ),
    "odd grid": (dict(mask_sampling="grid", mask_ratio=0.75), "even numbers of patches, not 3 x 4"),
    "no cell visible": (
        dict(mask_cell=2, mask_ratio=0.8, image_size=16),
        "model.mask_ratio=0.8 leaves none of 16 patches visible; lower it",
    ),
    "components": (dict(pca_targets=17), r"model.pca_targets=17 is outside \[1, 16\], the values of a patch"),
    "no components": (dict(pca_targets=0), r"model.pca_targets=0 is outside \[1, 16\]"),
    "normalised components": (
        dict(pca_targets=4, normalize_targets=True),
        "model.normalize_targets=True: principal components need .* or normalize_targets=False",
    ),
    "cross with mask tokens": (
        dict(decoder_attention="cross", encoder_mask_tokens=True),
        "model.decoder_attention=cross attends to visible patches alone: set model.encoder_mask_tokens=False",
    ),
    "prediction of self": (
        dict(prediction_ratio=0.25),
        "model.prediction_ratio=0.25 of .* with .*=cross .* no ratio",
    ),
    "prediction of all": (
        dict(decoder_attention="cross", loss_patches="all", prediction_ratio=0.25),
        "model.prediction_ratio=0.25 of .* with .* and model.loss_patches=hidden",
    ),
    "too many predicted": (
        dict(decoder_attention="cross", prediction_ratio=0.75),
        "model.prediction_ratio=0.75 of 12 patches must give at least one and at most the 6 hidden ones",
    ),
    "none predicted": (dict(decoder_attention="cross", prediction_ratio=0.05), "0.05 of 12 patches must give at least"),
    "prediction nan": (
        dict(decoder_attention="cross", prediction_ratio=math.nan),
        "model.prediction_ratio=nan of 12 patches must give at least one",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_make_no_model_are_refused_in_one_line_that_names_them(case):
    options, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        config_of(**options)
    assert "\n" not in str(error.value)


def test_images_of_a_grid_that_the_masks_do_not_fit_are_encoded_but_not_masked():
    model = model_of(mask_cell=2, image_size=(16, 16))
    assert model.encode(images()).shape == (2, 13, 16)
    with pytest.raises(UserError, match="model.mask_cell=2 does not divide the grid of 3 x 4"):
        model(images(), key=jax.random.key(0))
    grid = model_of(mask_sampling="grid", mask_ratio=0.75, image_size=(16, 16))
    with pytest.raises(UserError, match="needs mask_ratio=0.75, not 0.5"):
        grid(np.zeros((2, 16, 16, 1), np.float32), key=jax.random.key(0), mask_ratio=0.5)
