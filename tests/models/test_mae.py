import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mae_jax.models.layers import exact_gelu
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.models.targets import normalize_patches
from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import defaults
from tests.reference import leaves_by_block, loop_patches, max_relative, numpy_gelu, random_batch, random_params

SMALL = MAEConfig((12, 16), 4, 3, 16, 3, 2, 4.0, 12, 2, 3, 0.5)  # 3 x 4 patches, 6 of them hidden


def test_the_models_defaults_are_those_of_the_settings():
    usual = {field.name: field.default for field in dataclasses.fields(MAEConfig)}
    assert usual == defaults().model.to_dict() | {"dtype": "float32"}  # a run settles it by its chip


@functools.cache
def compiled(config: MAEConfig):
    """(params, images, noise) -> MAEOutput."""
    return jax.jit(lambda params, images, noise: make_bind(config)(params)(images, noise=noise))


# ------------------------------------------------------------------------------------- shapes, masks, and the loss


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@example(grid=(1, 2), p=1, channels=2, ratio=0.5, normalize=True)
@example(grid=(2, 3), p=2, channels=1, ratio=0.0, normalize=True)
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    p=st.integers(1, 5),
    channels=st.integers(1, 4),
    ratio=st.floats(0.01, 0.95),
    normalize=st.booleans(),
)
def test_every_size_patch_channel_count_and_ratio_gives_the_masked_mean_of_its_prediction(
    grid, p, channels, ratio, normalize
):
    num_patches = grid[0] * grid[1]
    assume(int(num_patches * (1 - ratio)) >= 1 and not (normalize and p * p * channels == 1))
    config = MAEConfig((grid[0] * p, grid[1] * p), p, channels, 8, 1, 2, 2.0, 8, 1, 1, ratio, normalize)
    images, noise = random_batch(config, 2)
    output = compiled(config)(random_params(config), images, noise)

    assert output.prediction.shape == (2, num_patches, p * p * channels) and output.prediction.dtype == jnp.float32
    assert np.isfinite(output.prediction).all()
    assert np.sum(output.mask, axis=1).tolist() == [num_patches - int(num_patches * (1 - ratio))] * 2
    assert np.sort(output.ids_restore, axis=1).tolist() == [list(range(num_patches))] * 2
    target = loop_patches(images, p).astype(np.float64)
    if normalize:
        mean, variance = target.mean(-1, keepdims=True), target.var(-1, ddof=1, keepdims=True)
        target = (target - mean) / np.sqrt(variance + 1e-6)
    error = ((output.prediction - target) ** 2).mean(-1)
    counted = np.asarray(output.mask) > 0 if ratio else np.ones_like(error, bool)
    # A mean of a few hundred float32 squares; two values that are close to another lose digits when normalised.
    np.testing.assert_allclose(output.loss, error[counted].mean(), rtol=1e-4)
    np.testing.assert_allclose(
        output.example_loss, [e[c].mean() for e, c in zip(error, counted, strict=True)], rtol=1e-4
    )


def test_with_ratio_0_nothing_is_hidden_and_the_loss_is_the_mean_over_all_patches():
    config = dataclasses.replace(SMALL, normalize_targets=False)
    images, noise = random_batch(config, 2)
    model = make_bind(config)(random_params(config))
    output = jax.jit(lambda images, noise: model(images, noise=noise, mask_ratio=0.0))(images, noise)
    assert not np.any(output.mask)
    error = (output.prediction - loop_patches(images, 4)) ** 2
    np.testing.assert_allclose(output.loss, np.mean(error), rtol=1e-6)


def test_a_ratio_that_is_too_small_to_hide_a_patch_still_gives_a_finite_loss():
    config = dataclasses.replace(SMALL, mask_ratio=1e-17)  # 1 - 1e-17 is 1 in floating point
    assert np.isfinite(compiled(config)(random_params(config), *random_batch(config, 2)).loss)


def test_the_mask_ratio_of_a_call_takes_the_place_of_the_models():
    images, noise = random_batch(SMALL, 2)
    model = make_bind(SMALL)(random_params(SMALL))
    mask = jax.jit(lambda: model(images, noise=noise, mask_ratio=0.75).mask)()
    assert np.sum(mask, axis=1).tolist() == [9, 9]


# -------------------------------------------------------------------------------------------------- who sees what


def test_hidden_pixels_change_no_bit_of_the_prediction_and_visible_ones_do():
    params, (images, noise) = random_params(SMALL), random_batch(SMALL, 2)
    output = compiled(SMALL)(params, images, noise)
    pixels_hidden = np.asarray(output.mask).reshape(2, 3, 4).repeat(4, axis=1).repeat(4, axis=2)[..., None] > 0
    others, _ = random_batch(SMALL, 2, seed=1)
    same = compiled(SMALL)(params, np.where(pixels_hidden, others, images), noise)
    np.testing.assert_array_equal(output.prediction, same.prediction)
    assert abs(same.loss - output.loss) > 0
    changed = compiled(SMALL)(params, np.where(pixels_hidden, images, others), noise)
    assert np.min(np.max(np.abs(changed.prediction - output.prediction), axis=-1)) > 1e-3


def test_the_encoder_works_on_the_visible_patches_and_the_class_token_only():
    model = make_bind(SMALL)(random_params(SMALL))
    patches = jax.ShapeDtypeStruct((2, 12, 48), jnp.float32)
    tokens = jax.eval_shape(lambda x, ids: model.encoder(x, (3, 4), ids)[0], patches, jnp.zeros((2, 5), int))
    assert tokens.shape == (2, 6, 16)


def test_the_order_of_the_visible_patches_does_not_matter():
    params, (images, noise) = random_params(SMALL), random_batch(SMALL, 2)
    order = np.argsort(noise, axis=1)
    other = noise.copy()
    np.put_along_axis(other, order[:, :6], np.take_along_axis(noise, order[:, 5::-1], axis=1), axis=1)
    output, shuffled = (compiled(SMALL)(params, images, n) for n in (noise, other))
    np.testing.assert_array_equal(output.mask, shuffled.mask)
    assert not np.array_equal(output.ids_restore, shuffled.ids_restore)
    # Attention sums in another order.
    assert max_relative(shuffled.prediction, output.prediction) < 1e-5


def test_two_hidden_patches_get_different_predictions_from_the_start():
    params = jax.jit(functools.partial(init_params, SMALL))(jax.random.key(0))
    output = compiled(SMALL)(params, *random_batch(SMALL, 2))
    for prediction, mask in zip(np.asarray(output.prediction), np.asarray(output.mask), strict=True):
        hidden = prediction[mask > 0]
        distances = np.abs(hidden[:, None] - hidden[None]).max(-1) + np.eye(len(hidden))
        assert distances.min() > 1e-2


def test_features_are_of_all_patches_and_of_any_image_size_the_patch_size_divides():
    model = make_bind(SMALL)(random_params(SMALL))
    for height, width in ((12, 16), (4, 20)):
        features = jax.jit(model.encode)(jnp.ones((2, height, width, 3)))
        assert features.shape == (2, 1 + height * width // 16, 16)
        assert len(np.unique(features[0], axis=0)) == len(features[0])  # equal patches, told apart by their positions


# ---------------------------------------------------------------------------------------------------------- masks


def test_one_key_gives_every_image_of_a_batch_another_mask():
    config = MAEConfig(32, 2, 1, 8, 1, 1, 1.0, 8, 1, 1)
    params, images = random_params(config), np.zeros((16, 32, 32, 1), np.float32)
    model, patches = make_bind(config)(params), jnp.zeros((16, 256, 1))
    masks = [model._masks(patches, (16, 16), jax.random.key(seed)).mask for seed in range(2)]
    assert len(np.unique(np.concatenate(masks), axis=0)) == 32
    from_call = jax.jit(lambda key: make_bind(config)(params)(images, key=key).mask)(jax.random.key(1))
    np.testing.assert_array_equal(from_call, masks[1])


def test_one_key_for_each_image_makes_its_result_independent_of_the_batch():
    params, (images, _) = random_params(SMALL), random_batch(SMALL, 4)
    keys = jax.random.split(jax.random.key(7), 4)
    model = make_bind(SMALL)(params)
    together = jax.jit(lambda keys, images: model(images, key=keys))(keys, images)
    alone = jax.jit(jax.vmap(lambda key, image: model(image[None], key=key[None])))(keys, images)
    np.testing.assert_array_equal(together.mask, alone.mask[:, 0])
    np.testing.assert_allclose(together.example_loss, alone.loss, rtol=1e-5)


def test_a_raw_key_and_a_typed_key_draw_the_same_masks():
    model = make_bind(SMALL)(random_params(SMALL))
    keys, patches = (jax.random.PRNGKey(5), jax.random.key(5)), jnp.zeros((3, 12, 1))
    masks = [model._masks(patches, (3, 4), key).mask for key in keys]
    np.testing.assert_array_equal(*masks)


def test_a_bfloat16_model_takes_its_noise_in_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    noise = (0.5 - 1e-5 * np.arange(12, dtype=np.float32))[None]  # all equal in bfloat16
    output = compiled(config)(random_params(config), np.ones((1, 12, 16, 3), np.float32), noise)
    assert output.ids_restore.tolist() == [list(range(11, -1, -1))]


# ------------------------------------------------------------------------------------------------ user's mistakes


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 225}, "patch size 16 does not divide the image size 225 x 225"),
        ({"image_size": "224"}, "model.image_size='224'"),
        ({"image_size": (224, 224, 3)}, "model.image_size"),
        ({"patch_size": 0}, "patch size 0"),
        ({"channels": 0}, "model.channels=0"),
        ({"depth": 0}, "model.depth=0"),
        ({"num_heads": 5}, "model.num_heads=5 does not divide model.width=768"),
        ({"decoder_num_heads": 3}, "model.decoder_num_heads=3 does not divide model.decoder_width=512"),
        ({"width": 6, "num_heads": 1}, "model.width=6 must be a multiple of 4"),
        ({"mask_ratio": 1.0}, "model.mask_ratio=1.0"),
        ({"mask_ratio": -0.1}, "model.mask_ratio=-0.1"),
        ({"mask_ratio": math.nan}, "model.mask_ratio=nan"),
        ({"mask_ratio": 0.999}, "model.mask_ratio=0.999 leaves none of 196 patches visible"),
        ({"dtype": "float16"}, "model.dtype='float16'"),
        ({"norm_epsilon": 0.0}, "model.norm_epsilon=0.0"),
        ({"mlp_ratio": 0.0}, "model.mlp_ratio=0.0"),
        ({"scan_unroll": 0}, "model.scan_unroll=0"),
        ({"image_size": 4, "patch_size": 1, "channels": 1}, "model.normalize_targets"),
    ],
)
def test_a_setting_that_makes_no_model_is_named(changes, named):
    with pytest.raises(UserError, match=named):
        MAEConfig(**changes)


@pytest.mark.parametrize("shape", [(12, 16, 3), (2, 12, 16, 1), (2, 3, 12, 16), (2, 13, 16, 3), (2, 12, 18, 3)])
def test_images_that_do_not_fit_the_model_are_refused(shape):
    model = make_bind(SMALL)(random_params(SMALL))
    for call in (model.encode, functools.partial(model, key=jax.random.key(0))):
        with pytest.raises(UserError, match="images of shape|does not divide"):
            call(jnp.zeros(shape))


@pytest.mark.parametrize("ratio", [1.0, -0.5, 0.99])
def test_a_ratio_given_in_a_call_is_checked(ratio):
    model = make_bind(SMALL)(random_params(SMALL))
    with pytest.raises(UserError, match=f"mask_ratio={ratio}"):
        model(jnp.zeros((2, 12, 16, 3)), key=jax.random.key(0), mask_ratio=ratio)


def test_masks_need_exactly_one_source_of_randomness_that_fits():
    model, images = make_bind(SMALL)(random_params(SMALL)), jnp.zeros((2, 12, 16, 3))
    key, noise = jax.random.key(0), jnp.zeros((2, 12))
    for arguments in ({}, {"key": key, "noise": noise}, {"noise": noise[:1]}, {"key": jax.random.split(key, 3)}):
        with pytest.raises(ValueError, match="give one of key=, noise= and mask=|noise of shape|keys of shape"):
            model(images, **arguments)


# ------------------------------------------------------------------------------------------------------- formulas


def test_targets_are_normalised_by_the_unbiased_variance_of_all_values_of_a_patch():
    patches = np.random.default_rng(0).random((2, 3, 4), np.float32)  # of 4 values: biased would be 15 % larger
    x = patches.astype(np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, ddof=1, keepdims=True) + 1e-6)
    normalized = normalize_patches(jnp.asarray(patches))
    np.testing.assert_allclose(normalized, expected, rtol=0, atol=2e-6)


def test_a_patch_of_one_colour_is_normalised_to_zeros():
    np.testing.assert_array_equal(normalize_patches(jnp.full((1, 1, 12), 0.5)), np.zeros((1, 1, 12)))


def test_gelu_is_the_exact_one():
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    # The tanh approximation is off by 4.7e-4.
    np.testing.assert_allclose(exact_gelu(jnp.asarray(x)), numpy_gelu(x.astype(np.float64)), rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------------- compute


@functools.cache
def loss_and_grads(**changes):
    config = dataclasses.replace(SMALL, **changes)
    images, noise = random_batch(config, 4)
    loss_fn = jax.jit(jax.value_and_grad(lambda params: make_bind(config)(params)(images, noise=noise).loss))
    return loss_fn(jax.tree.map(jnp.asarray, random_params(config)))


@pytest.mark.parametrize("changes", [{"remat": True, "scan_unroll": 2}, {"scan_unroll": 3}], ids=str)
def test_rematerialising_and_unrolling_change_neither_loss_nor_gradients(changes):
    (loss, grads), (expected_loss, expected) = loss_and_grads(**changes), loss_and_grads()
    assert max_relative(loss, expected_loss) < 1e-6
    for name, grad in leaves_by_block(grads).items():
        # The same sums, which the compiler may put into another order.
        assert max_relative(grad, leaves_by_block(expected)[name]) < 1e-5, name


def test_rematerialising_recomputes_the_blocks_in_the_backward_pass():
    def count_exponentials(remat):
        config = dataclasses.replace(SMALL, remat=remat)
        images, noise = random_batch(config, 1)
        grad_fn = jax.grad(lambda params: make_bind(config)(params)(images, noise=noise).loss)
        return str(jax.make_jaxpr(grad_fn)(random_params(config))).count(" exp ")

    assert count_exponentials(True) > count_exponentials(False) > 0  # the softmax's


def test_bfloat16_products_are_close_to_float32_and_parameters_and_gradients_stay_float32():
    (loss, grads), (expected_loss, expected) = loss_and_grads(dtype="bfloat16"), loss_and_grads()
    assert 0 < max_relative(loss, expected_loss) < 1e-2  # bfloat16 has 8 bits: 4e-3 a product
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    flat = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (grads, expected)]
    assert np.dot(*flat) / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]) > 0.999
    assert not np.array_equal(*flat)
