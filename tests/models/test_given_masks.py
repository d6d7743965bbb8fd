"""Masks that a user gives in place of a key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.data.processor import Processor
from mae_jax.models.mae import MAEConfig, make_bind
from mae_jax.models.masking import check_given_mask, given_masks, masks_from_noise
from mae_jax.runtime.errors import UserError
from tests.reference import drawn_masks, loop_patches, random_batch, random_params

GRID = 2, 3
MODEL = MAEConfig((8, 12), 4, 1, 8, 1, 2, 2.0, 8, 1, 2, 0.5, False)
ONE = np.array([[1, 0, 1], [0, 1, 1]])  # 2 of 6 patches visible
EACH = np.stack([ONE, ONE[::-1], 1 - np.eye(3)[:2]])  # of three images


@functools.cache
def model():
    return make_bind(MODEL)(random_params(MODEL))


@functools.cache
def images(seed=0):
    return random_batch(MODEL, 3, seed)[0]


FORMS = {
    "[L]": (ONE.reshape(-1), [ONE] * 3),
    "[rows, columns]": (ONE, [ONE] * 3),
    "[B, L]": (EACH.reshape(3, 6), EACH),
    "[B, rows, columns]": (EACH, EACH),
    "bools": (EACH > 0, EACH),
    "any number but 0": (EACH * -0.5, EACH),
    "an array of JAX": (jnp.asarray(EACH), EACH),
    "nested lists": (ONE.tolist(), [ONE] * 3),
    "a function": (lambda number, grid: EACH[number], EACH),
    "a function that gives [L]": (lambda number, grid: EACH[number].reshape(-1), EACH),
}


@pytest.mark.parametrize("form", FORMS)
def test_masks_by_hand_hide_what_is_not_zero_in_whatever_form(form):
    given, expected = FORMS[form]
    found, visible = check_given_mask(given, 3, GRID)
    assert visible == 2 and found.dtype == bool
    np.testing.assert_array_equal(found, np.reshape(expected, (3, 6)) > 0)


def test_a_mask_function_gets_the_number_of_each_image_and_the_grid():
    calls = []
    check_given_mask(lambda number, grid: calls.append((number, grid)) or ONE, 3, GRID)
    assert calls == [(0, GRID), (1, GRID), (2, GRID)]


def test_masks_by_hand_are_those_of_noise_in_the_same_order():
    hidden = check_given_mask(EACH, 3, GRID)[0]
    found = given_masks(jnp.asarray(hidden), 2)
    noise = jnp.asarray(hidden, jnp.float32) + np.arange(6) / 10
    for ours, expected in zip(found, masks_from_noise(noise, 0.6), strict=True):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(found.mask, hidden)


def test_the_model_hides_what_is_given_and_computes_what_it_does_for_noise_in_that_order():
    noise = EACH.reshape(3, 6) + np.arange(6) / 10
    output = jax.jit(lambda x: model()(x, mask=EACH))(images())  # inside jit, the mask from outside
    expected = jax.jit(lambda x: model()(x, noise=jnp.asarray(noise), mask_ratio=0.6))(images())
    np.testing.assert_array_equal(output.mask, EACH.reshape(3, 6))
    for ours, theirs in zip(output[:5], expected[:5], strict=True):
        np.testing.assert_array_equal(ours, theirs)  # the same computation
    error = np.mean((output.prediction - loop_patches(images(), 4)) ** 2, axis=-1)
    np.testing.assert_allclose(output.loss, error[EACH.reshape(3, 6) > 0].mean(), rtol=1e-5)  # float32 sums


def test_pixels_hidden_by_hand_change_no_bit_of_the_prediction_and_visible_ones_do():
    predict = jax.jit(lambda x: model()(x, mask=EACH).prediction)
    hidden = EACH.repeat(4, axis=1).repeat(4, axis=2)[..., None] > 0
    prediction = predict(images())
    np.testing.assert_array_equal(prediction, predict(np.where(hidden, images(1), images())))
    changed = predict(np.where(hidden, images(), images(1)))
    assert np.min(np.max(np.abs(changed - prediction), axis=-1)) > 1e-3


def test_the_encoder_gives_the_features_of_the_patches_that_are_visible():
    found = model().encode(images(), mask=EACH, output_masks=True)
    assert found.features.shape == (3, 3, 8)
    np.testing.assert_array_equal(found.mask, EACH.reshape(3, 6))
    # Each image by itself, with its visible patches chosen by their numbers.
    for image, mask, features in zip(images(), EACH.reshape(3, 6), found.features, strict=True):
        keep = jnp.asarray(np.flatnonzero(mask == 0))[None]
        expected = model().encoder(jnp.asarray(loop_patches(image[None], 4)), GRID, keep)[0][0]
        np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)


def test_pictures_are_drawn_with_the_mask_that_is_given():
    bound = make_bind(MODEL)(random_params(MODEL))
    bound.processor = Processor((8, 12), 1, (0.5,), (0.25,), 1.0)
    pictures = bound.reconstruct(images(), mask=ONE)
    originals = bound.processor.to_pictures(images())
    same = (np.asarray(pictures) == originals).reshape(3, 2, 4, 3, 4).all((0, 2, 4))
    np.testing.assert_array_equal(same, ONE == 0)


def test_any_number_of_visible_patches_may_be_given_also_all():
    assert model()(images(), mask=np.zeros(6)).mask.sum() == 0
    assert model()(images(), mask=1 - np.eye(6)[0]).mask.sum() == 15
    assert np.isfinite(model()(images(), mask=np.zeros(6)).loss)


def test_drawn_masks_of_the_models_own_type_are_taken_as_they_are():
    masks = drawn_masks(jax.random.split(jax.random.key(0), 3), (2, 3), 0.5)
    np.testing.assert_array_equal(model()(images(), mask=masks).ids_restore, masks.ids_restore)


REFUSED = {
    "unequal counts": (np.stack([ONE, ONE, np.zeros((2, 3))]), "leave 2 to 6 of 6 patches visible"),
    "none visible": (np.ones(6), "leave 0 to 0 of 6 patches visible; every image needs the same number, at least one"),
    "wrong shape": (np.ones((3, 2)), r"shape \(3, 2\): one of \(6,\), \(2, 3\), \(3, 6\), \(3, 2, 3\) is needed"),
    "another batch": (EACH[:2], r"shape \(2, 2, 3\)"),
    "a function of the wrong shape": (
        lambda number, grid: ONE.T,
        r"gives an array of shape \(3, 2\) for image 0: \(6,\) or \(2, 3\) is needed",
    ),
    "a function that differs": (
        lambda number, grid: ONE if number < 2 else ONE[:1],
        r"gives an array of shape \(1, 3\) for image 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mask_that_does_not_fit_is_refused_in_one_line(case):
    mask, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as error:
        model()(images(), mask=mask)
    assert "\n" not in str(error.value)


def test_a_traced_mask_is_refused_in_one_line_that_tells_why():
    with pytest.raises(UserError, match="decides shapes: inside jax.jit let mask be a NumPy array") as error:
        jax.jit(lambda x, mask: model()(x, mask=mask).loss)(images(), ONE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("call", ["__call__", "encode", "reconstruct"])
def test_a_mask_stands_alone_without_key_noise_or_ratio(call):
    bound = make_bind(MODEL)(random_params(MODEL))
    bound.processor = Processor((8, 12), 1, (0.5,), (0.25,), 1.0)
    run, drawn = getattr(bound, call), drawn_masks(jax.random.split(jax.random.key(0), 3), (2, 3), 0.5)
    for others in ({"key": jax.random.key(0)}, {"noise": np.zeros((3, 6), np.float32)}):
        with pytest.raises(ValueError, match="give one of key=, noise= and mask="):
            run(images(), mask=ONE, **others)
    for mask in (ONE, drawn):
        with pytest.raises(ValueError, match="mask_ratio=0.5 cannot be given with mask=, which decides that"):
            run(images(), mask=mask, mask_ratio=0.5)
