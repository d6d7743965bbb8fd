"""What a user may choose when a model is loaded: image size, positions, precision."""

import dataclasses

import jax
import numpy as np
import pytest

import mae_jax
from mae_jax.interop.formats import export
from mae_jax.interop.workdirs import Weights
from mae_jax.models.mae import MAEConfig, make_bind
from mae_jax.models.positions import resize_positions, sincos_table
from mae_jax.runtime.errors import UserError
from tests.reference import max_relative, random_batch, random_params

CONFIG = MAEConfig(12, 4, 3, 16, 2, 2, 4.0, 12, 1, 3, 0.5)
DATA = {"name": None, "mean": (0.4, 0.5, 0.6), "std": (0.2,), "eval_crop": 0.5}
IMAGES, NOISE = random_batch(dataclasses.replace(CONFIG, image_size=(8, 20)), 2)


def encode(model, images):
    """Tokens, by one compiled program."""
    return jax.jit(model.encode)(images)


def call(model):
    return jax.jit(model.__call__)(IMAGES, noise=NOISE)


def save(folder, config):
    params = random_params(config)
    weights = Weights({"task": "pretrain", "model": dataclasses.asdict(config), "data": DATA}, params, 7, "a test")
    export(weights, folder, "huggingface")
    return params


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """(folder, parameters) of a model whose positions are the formula."""
    folder = tmp_path_factory.mktemp("fixed")
    return folder, save(folder, CONFIG)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """(folder, parameters) of a model with tables of its own."""
    folder = tmp_path_factory.mktemp("learned")
    return folder, save(folder, dataclasses.replace(CONFIG, positions="learned"))


def test_fixed_positions_are_computed_for_another_image_size(fixed):
    folder, params = fixed
    model = mae_jax.load(folder, image_size=(8, 20))
    assert model.config.positions == "sincos" and model.config.image_size == (8, 20)
    assert model.processor.image_size == (8, 20) and model.processor.mean == DATA["mean"]
    assert model.processor.std == (0.2, 0.2, 0.2) and model.processor.eval_crop == 0.5
    expected = make_bind(dataclasses.replace(CONFIG, image_size=(8, 20)))(params)
    np.testing.assert_array_equal(call(model).prediction, call(expected).prediction)
    np.testing.assert_array_equal(encode(mae_jax.load(folder), IMAGES), encode(model, IMAGES))


def test_learned_positions_are_resized_for_another_image_size(learned):
    folder, params = learned
    model = mae_jax.load(folder, image_size=(8, 20))
    for part in ("encoder", "decoder"):
        table = resize_positions(params[part]["positions"], (3, 3), (2, 5))
        np.testing.assert_array_equal(getattr(model, part).positions[...], table)
    np.testing.assert_allclose(encode(mae_jax.load(folder), IMAGES), encode(model, IMAGES), rtol=0, atol=1e-5)


def test_fixed_positions_can_be_taken_as_learned_ones(fixed):
    folder, _ = fixed
    model = mae_jax.load(folder, positions="learned")
    np.testing.assert_array_equal(model.encoder.positions[...], sincos_table((3, 3), 16))
    np.testing.assert_array_equal(model.decoder.positions[...], sincos_table((3, 3), 12))
    own_size = np.zeros((1, 12, 12, 3), np.float32)
    np.testing.assert_array_equal(encode(model, own_size), encode(mae_jax.load(folder), own_size))
    assert max_relative(encode(model, IMAGES), encode(mae_jax.load(folder), IMAGES)) > 1e-3  # resized, not computed


def test_learned_positions_cannot_be_thrown_away(learned):
    with pytest.raises(UserError, match="learned positions, which would be lost"):
        mae_jax.load(learned[0], positions="sincos")


def test_products_in_bfloat16_are_near_those_in_float32_and_parameters_stay_as_they_are(fixed):
    folder, _ = fixed
    exact, fast = mae_jax.load(folder), mae_jax.load(folder, dtype="bfloat16")
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(fast))
    difference = max_relative(encode(fast, IMAGES), encode(exact, IMAGES))
    assert 1e-4 < difference < 0.05  # bfloat16 has 8 bits: 4e-3 a product
    assert mae_jax.load(folder, remat=True, mask_ratio=0.25).config.mask_ratio == 0.25


def test_a_model_in_memory_that_jax_took_over_is_the_same_after_its_files_are_gone(tmp_path):
    params = save(tmp_path / "model", CONFIG)
    model = mae_jax.load(tmp_path / "model")
    for file in (tmp_path / "model").iterdir():
        file.unlink()
    expected = make_bind(CONFIG)(params)
    np.testing.assert_array_equal(call(model).loss, call(expected).loss)
