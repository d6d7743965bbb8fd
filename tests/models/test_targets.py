"""Principal components of patches as targets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from mae_jax.models.mae import MAEConfig, fit_fixed, init_params, make_bind, split_fixed
from mae_jax.models.parameters import join
from mae_jax.models.targets import TARGETS, PrincipalComponents, Target
from mae_jax.runtime.errors import UserError
from tests.reference import loop_patches, random_batch, random_params

PIXELS = MAEConfig(8, 4, 1, 16, 1, 2, 2.0, 12, 1, 3, 0.5, False)  # 2 x 2 patches of 16 values


def digits(count=500):
    return (load_digits().images[:count, :, :, None] / 16 - 0.3).astype(np.float32)


@functools.cache
def fitted(components):
    images = digits()
    target = PrincipalComponents(dataclasses.replace(PIXELS, pca_targets=components))
    return target.fit([images[:100], images[100:101], images[101:]])


@pytest.mark.parametrize("components", [1, 5, 14])
def test_the_basis_is_scikit_learns_principal_components_of_all_patches(components):
    patches = loop_patches(digits(), 4).reshape(-1, 16).astype(np.float64)
    pca = PCA(components, svd_solver="full").fit(patches)
    found = fitted(components)
    np.testing.assert_allclose(found["mean"], pca.mean_, rtol=0, atol=1e-7)
    signs = np.sign(np.sum(found["components"] * pca.components_, axis=1, keepdims=True))
    # Both are float64, ours by the covariance; the basis is kept in float32, which has 6e-8.
    np.testing.assert_allclose(found["components"] * signs, pca.components_, rtol=0, atol=1e-6)
    assert (found["components"].max(1) == np.abs(found["components"]).max(1)).all()  # each has one of two signs


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    components=st.integers(1, 18), p=st.sampled_from([1, 2, 3]), channels=st.integers(1, 2), constant=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_any_basis_is_orthonormal_also_where_the_patches_do_not_vary(components, p, channels, constant, seed):
    config = MAEConfig((2 * p, 3 * p), p, channels, 8, 1, 2, 2.0, 8, 1, 1, 0.5, False)
    components = min(components, config.patch_dim)
    config = dataclasses.replace(config, pca_targets=components)
    images, _ = random_batch(config, 5, seed)
    basis = PrincipalComponents(config).fit([images * (not constant)])
    assert basis["components"].shape == (components, p * p * channels)
    np.testing.assert_allclose(basis["components"] @ basis["components"].T, np.eye(components), rtol=0, atol=1e-6)


def test_fewer_patches_than_components_are_refused_by_number():
    config = MAEConfig(8, 8, 1, 8, 1, 2, 2.0, 8, 1, 1, 0.0, False, pca_targets=9)
    with pytest.raises(UserError, match="model.pca_targets=9 is more than the 8 patches of the training data"):
        PrincipalComponents(config).fit([digits(8)])


def with_basis(components):
    """A model's parameters, with the fitted basis."""
    params = random_params(dataclasses.replace(PIXELS, pca_targets=components))
    return params | {"decoder": params["decoder"] | {"basis": fitted(components)}}


def test_with_all_components_loss_and_predictions_are_those_of_the_pixels():
    # The components turn the pixels: the distance between target and prediction stays.
    config, params, basis = dataclasses.replace(PIXELS, pca_targets=16), with_basis(16), fitted(16)
    predict = params["decoder"]["predict"]
    turned = {
        "kernel": predict["kernel"] @ basis["components"],
        "bias": predict["bias"] @ basis["components"] + basis["mean"],
    }
    decoder = {name: value for name, value in params["decoder"].items() if name != "basis"} | {"predict": turned}
    images, noise = digits(6), random_batch(PIXELS, 6)[1]
    found = make_bind(config)(params)(images, noise=noise)
    expected = make_bind(PIXELS)(params | {"decoder": decoder})(images, noise=noise)
    assert found.loss == pytest.approx(float(expected.loss), rel=1e-5)  # roundings of float32
    np.testing.assert_allclose(found.example_loss, expected.example_loss, rtol=1e-5)
    np.testing.assert_allclose(found.prediction, expected.prediction, rtol=0, atol=1e-5)


def test_the_loss_is_the_squared_error_of_the_coefficients_and_predictions_are_pixels():
    config, params, basis = dataclasses.replace(PIXELS, pca_targets=3), with_basis(3), fitted(3)
    images, noise = digits(6), random_batch(PIXELS, 6)[1]
    output = make_bind(config)(params)(images, noise=noise)
    assert output.prediction.shape == (6, 4, 16)
    coefficients = (np.asarray(output.prediction, np.float64) - basis["mean"]) @ basis["components"].T
    targets = (loop_patches(images, 4) - basis["mean"]) @ basis["components"].T
    error = ((coefficients - targets) ** 2).mean(-1)[np.asarray(output.mask) > 0]
    assert output.loss == pytest.approx(error.mean(), rel=1e-5)
    inside = coefficients @ basis["components"] + basis["mean"]  # predictions lie in the components' plane
    np.testing.assert_allclose(output.prediction, inside, rtol=0, atol=1e-5)


def test_the_basis_is_no_parameter_that_trains():
    config = dataclasses.replace(PIXELS, pca_targets=3)
    variables = init_params(config, jax.random.key(0))
    params, fixed = split_fixed(config, variables)
    assert "basis" not in params["decoder"]
    assert jax.tree.map(np.shape, fixed) == {"decoder": {"basis": {"mean": (16,), "components": (3, 16)}}}
    assert jax.tree.structure(join(params, fixed)) == jax.tree.structure(variables)
    plain = init_params(PIXELS, jax.random.key(0))
    assert split_fixed(PIXELS, plain) == (plain, {})
    assert split_fixed(PIXELS, {"encoder": plain["encoder"]}) == ({"encoder": plain["encoder"]}, {})


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(normalize_targets=True), "normalized_pixels"), (dict(normalize_targets=False), "pixels"),
        (dict(normalize_targets=False, pca_targets=3), "principal_components"),
        (dict(target="principal_components", pca_targets=3), "principal_components"),
        (dict(target="pixels", normalize_targets=True), "pixels"),
    ],
)  # fmt: skip
def test_a_target_is_named_or_follows_from_the_two_settings_that_were_there_before(options, name):
    config = dataclasses.replace(PIXELS, **options)
    assert config.target_name == name
    assert type(make_bind(config)(init_params(config, jax.random.key(0))).decoder.basis) is TARGETS[name]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(target="pixel"), "model.target='pixel' is not one of pixels, .*pixels"),
        (dict(target="principal_components"), "principal components need their number pca_targets"),
        (dict(target="pixels", pca_targets=3), "and target=principal_components"),
    ],
)
def test_targets_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PIXELS, **options)


class Differences(Target):
    """What each patch adds to a constant that is fitted to the data; it is of another size than the patch."""

    def __init__(self, config):
        super().__init__(config)
        self.mean = nnx.Variable(jnp.zeros(2))

    @staticmethod
    def dim(config):
        return 2

    def __call__(self, patches):
        return patches[..., :2] - self.mean[...]

    def to_patches(self, prediction):
        return jnp.pad(prediction, ((0, 0), (0, 0), (0, self.config.patch_dim - 2)))

    def fit(self, batches):
        return {"mean": np.mean([loop_patches(images, 4)[..., :2] for images in batches], axis=(0, 1, 2))}


def test_a_target_of_ones_own_trains_with_what_it_fits():
    config = dataclasses.replace(PIXELS, target=f"{__name__}:Differences")
    images, noise = digits(6), random_batch(PIXELS, 6)[1]
    params, fixed = split_fixed(config, random_params(config))
    fixed = fit_fixed(config, [images])
    output = make_bind(config)(join(params, fixed))(images, noise=noise)
    patches = loop_patches(images, 4)
    targets = patches[..., :2] - patches[..., :2].mean((0, 1))
    error = ((np.asarray(output.prediction)[..., :2] - targets) ** 2).mean(-1)[np.asarray(output.mask) > 0]
    assert output.prediction.shape == (6, 4, 16) and params["decoder"]["predict"]["bias"].shape == (2,)
    assert output.loss == pytest.approx(error.mean(), rel=1e-5)
