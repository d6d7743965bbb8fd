"""Pixels without data are left out of the loss and of the targets, against NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

from mae_jax.models import masking
from mae_jax.models.mae import PREDICTED, MAEConfig, make_bind
from mae_jax.models.targets import PrincipalComponents, reconstruct
from mae_jax.runtime.errors import UserError
from tests.reference import loop_patches, numpy_mae, random_batch, random_params

MODEL = MAEConfig(8, 4, 2, 16, 1, 2, 2.0, 12, 1, 3, 0.5, True)  # 2 x 2 patches of 32 values
IMAGES, NOISE = random_batch(MODEL, 5)
VALID = np.random.default_rng(1).random(IMAGES.shape) < 0.7
VALID[1] = False  # an image without data
VALID[2, :, :, 1] = False  # a channel
VALID[3, :4, :4] = False
VALID[3, 1, 1, 0] = True  # a patch with one value
CONFIGS = {
    "normalised": MODEL,
    "pixels": dataclasses.replace(MODEL, normalize_targets=False),
    "all patches": dataclasses.replace(MODEL, loss_patches="all"),
}


def targets_of(patches, valid, normalized):
    """Targets of patches [B, L, D] by the formula, patch by patch in float64; NaN where there is no data."""
    targets = np.where(valid, patches.astype(np.float64), np.nan)
    for target in targets.reshape(-1, targets.shape[-1]) if normalized else ():
        values = target[~np.isnan(target)]
        variance = values.var(ddof=1) if len(values) > 1 else 0.0
        target[:] = (target - values.mean() if len(values) else target) / np.sqrt(variance + 1e-6)
    return targets


def mean_error(prediction, targets, counted):
    """The mean over each image's valid values in the patches `counted` [B, L]; 0 if there are none."""
    errors = [(p - t)[c > 0] ** 2 for p, t, c in zip(np.asarray(prediction), targets, counted, strict=True)]
    return np.array([error[~np.isnan(error)].mean() if (~np.isnan(error)).any() else 0.0 for error in errors])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_and_the_targets_statistics_are_those_of_the_values_with_data(name):
    config, params = CONFIGS[name], random_params(MODEL)
    output = jax.jit(lambda x, v: make_bind(config)(params)(x, noise=NOISE, valid=v))(IMAGES, VALID)
    patches, valid = loop_patches(IMAGES, 4), loop_patches(VALID, 4)
    targets = targets_of(patches, valid, config.normalize_targets)
    counted = output.mask if config.loss_patches == "hidden" else np.ones_like(output.mask)
    expected = mean_error(output.prediction, targets, np.asarray(counted))
    assert expected[1] == output.example_loss[1] == 0 and (expected[[0, 2, 3, 4]] > 0).all()
    np.testing.assert_allclose(output.example_loss, expected, rtol=1e-4)  # float32; a lone value is divided by 1e-3
    assert output.loss == pytest.approx(expected.mean(), rel=1e-4)
    _, prediction = numpy_mae(params, config, np.where(VALID, IMAGES, 0), NOISE)  # the encoder sees zeros
    np.testing.assert_allclose(output.prediction, prediction, rtol=0, atol=1e-4)


@jax.jit
def differentiate(params, images, valid):
    """The training loss, and its gradient with respect to parameters and images."""
    keys = jax.random.split(jax.random.key(0), 5)

    def loss(params, images):
        return make_bind(MODEL)(params).training_loss(images, keys, valid)[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(params, images)


def test_with_data_everywhere_the_loss_and_its_gradient_are_as_if_nothing_were_said_about_it():
    params = random_params(MODEL)
    found, expected = (differentiate(params, IMAGES, valid) for valid in (np.ones_like(VALID), None))
    assert found[0] == expected[0]
    # XLA orders some sums differently.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max()), found, expected)


def test_what_stands_where_there_is_no_data_changes_nothing_and_has_no_gradient():
    params = random_params(MODEL)
    value, (grads, of_images) = differentiate(params, IMAGES, VALID)
    assert np.isfinite(value) and (np.asarray(of_images)[~VALID] == 0).all()
    for other in (1e4, np.nan, np.inf):
        other_value, (other_grads, _) = differentiate(params, np.where(VALID, IMAGES, np.float32(other)), VALID)
        jax.tree.map(np.testing.assert_array_equal, (value, grads), (other_value, other_grads))
    # Predictions of a channel that never has data are free.
    _, (grads, _) = differentiate(params, IMAGES, VALID & np.array([True, False]))
    bias = np.asarray(grads["decoder"]["predict"]["bias"]).reshape(16, 2)
    assert (bias[:, 1] == 0).all() and (bias[:, 0] != 0).all()


def test_some_patches_of_several_masks_of_an_image_leave_out_what_has_no_data_too():
    settings = dict(decoder_attention="cross", prediction_ratio=0.25, masks_per_image=2, image_size=16)
    config = dataclasses.replace(MODEL, **settings)
    images, _ = random_batch(config, 3)
    valid, params = np.random.default_rng(2).random(images.shape) < 0.6, random_params(config)
    keys, model = jax.random.split(jax.random.key(0), 3), make_bind(config)(params)
    found, _ = jax.jit(model.training_loss)(jnp.asarray(images), keys, valid)
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(keys).reshape(-1)
    twice = [np.repeat(x, 2, axis=0) for x in (images, valid)]
    masks = masking.draw_masks(keys, None, (4, 4), 0.5, config)
    ids = np.asarray(masking.some_hidden(jax.vmap(jax.random.fold_in, (0, None))(keys, PREDICTED), masks, 4))
    counted = (np.arange(16) == ids[:, :, None]).any(1)
    # With cross-attention, a patch's prediction does not depend on which others are predicted.
    prediction = jax.jit(lambda: model(twice[0], mask=masks, valid=twice[1]).prediction)()
    targets = targets_of(*(loop_patches(x, 4) for x in twice), True)
    assert counted.sum() == 6 * 4
    assert found == pytest.approx(mean_error(prediction, targets, counted).mean(), rel=1e-5)


def test_principal_components_leave_out_patches_that_lack_data_when_they_are_fitted_and_in_the_loss():
    config = dataclasses.replace(MODEL, normalize_targets=False, pca_targets=3)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((40, 8, 8, 2)).astype(np.float32)
    valid = np.repeat(np.repeat(rng.random((40, 4, 4, 1)) < 0.9, 2, axis=1), 2, axis=2) | np.zeros(2, bool)
    basis = PrincipalComponents(config).fit([np.where(valid, images, np.nan)])
    whole = loop_patches(valid, 4).all(-1)
    pca = PCA(3, svd_solver="full").fit(loop_patches(images, 4)[whole].astype(np.float64))
    assert 0.3 < whole.mean() < 0.9
    np.testing.assert_allclose(basis["mean"], pca.mean_, atol=1e-6)
    np.testing.assert_allclose(np.abs(np.sum(basis["components"] * pca.components_, axis=1)), 1, atol=1e-6)

    params = random_params(config)
    params["decoder"]["basis"] = basis
    noise = rng.random((40, 4), np.float32)
    output = jax.jit(lambda: make_bind(config)(params)(images, noise=noise, valid=valid))()
    coefficients = (np.asarray(output.prediction, np.float64) - basis["mean"]) @ basis["components"].T
    targets = (loop_patches(images, 4) - basis["mean"]) @ basis["components"].T
    expected = mean_error(coefficients, np.where(whole[..., None], targets, np.nan), np.asarray(output.mask))
    np.testing.assert_allclose(output.example_loss, expected, rtol=1e-4, atol=1e-6)


def test_normalised_predictions_are_drawn_with_the_statistics_of_the_values_with_data():
    prediction = np.ones((5, 4, 32), np.float32)
    found = reconstruct(jnp.where(VALID, IMAGES, 0), prediction, np.ones((5, 4)), 4, True, jnp.asarray(VALID))
    for patch, valid, drawn in zip(loop_patches(IMAGES, 4)[0], loop_patches(VALID, 4)[0],
                                   loop_patches(np.asarray(found.prediction), 4)[0], strict=True):  # fmt: skip
        values = patch[valid].astype(np.float64)
        np.testing.assert_allclose(drawn, values.mean() + np.sqrt(values.var(ddof=1) + 1e-6), rtol=1e-5)


def test_a_mask_of_data_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"valid of shape \(5, 8, 8\): it must be that of the images, \(5, 8, 8, 2\)"):
        make_bind(MODEL)(random_params(MODEL))(IMAGES, noise=NOISE, valid=VALID[..., 0])
