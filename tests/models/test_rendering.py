import jax
import numpy as np
import pytest
from flax import nnx

from mae_jax.models.mae import MAEConfig, MaskedAutoencoder
from mae_jax.models.patches import patchify
from mae_jax.models.targets import normalize_patches, reconstruct

CONFIG = MAEConfig(
    image_size=(8, 12), patch_size=4, channels=3, width=16, depth=1, num_heads=2,
    decoder_width=16, decoder_depth=1, decoder_num_heads=2, mask_ratio=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def output_and_images():
    images = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3))
    return MaskedAutoencoder(CONFIG, rngs=nnx.Rngs(0))(images, key=jax.random.key(1)), images


def hidden_pixels(mask):
    """[B, H, W] computed patch by patch."""
    hidden = np.zeros((2, 8, 12), bool)
    for b, row, column in np.ndindex(2, 2, 3):
        hidden[b, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = mask[b, 3 * row + column] == 1
    return hidden


def test_pasting_keeps_the_visible_pixels_and_predicts_the_hidden_ones(output_and_images):
    output, images = output_and_images
    found = reconstruct(images, output.prediction, output.mask, 4, normalized_targets=False)
    hidden = hidden_pixels(np.asarray(output.mask))
    np.testing.assert_array_equal(np.asarray(found.pasted)[~hidden], np.asarray(images)[~hidden])
    np.testing.assert_array_equal(np.asarray(found.pasted)[hidden], np.asarray(found.prediction)[hidden])
    np.testing.assert_array_equal(np.asarray(found.visible)[..., 0], ~hidden)


def test_a_perfect_prediction_of_normalised_targets_gives_the_original_back(output_and_images):
    output, images = output_and_images
    perfect = output._replace(prediction=normalize_patches(patchify(images, 4)))
    found = reconstruct(images, perfect.prediction, perfect.mask, 4, normalized_targets=True)
    np.testing.assert_allclose(found.prediction, images, atol=2e-6)  # float32 rounding of the round trip
