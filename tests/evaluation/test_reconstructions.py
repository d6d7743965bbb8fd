import jax
import numpy as np
import pytest
from flax import nnx

from mae_jax.evaluation.reconstructions import HEADINGS, Reconstructions, draw_reconstructions, reconstruct
from mae_jax.models.mae import MAEConfig, MaskedAutoencoder, normalize_patches
from mae_jax.models.patches import patchify

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
    found = reconstruct(images, output, 4, normalized_targets=False)
    hidden = hidden_pixels(np.asarray(output.mask))
    np.testing.assert_array_equal(np.asarray(found.pasted)[~hidden], np.asarray(images)[~hidden])
    np.testing.assert_array_equal(np.asarray(found.pasted)[hidden], np.asarray(found.prediction)[hidden])
    np.testing.assert_array_equal(np.asarray(found.visible)[..., 0], ~hidden)


def test_a_perfect_prediction_of_normalised_targets_gives_the_original_back(output_and_images):
    output, images = output_and_images
    perfect = output._replace(prediction=normalize_patches(patchify(images, 4)))
    found = reconstruct(images, perfect, 4, normalized_targets=True)
    np.testing.assert_allclose(found.prediction, images, atol=2e-6)  # float32 rounding of the round trip


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_sheet_shows_original_masked_prediction_and_pasted_side_by_side(channels):
    rng = np.random.default_rng(0)
    original, predicted = (rng.uniform(0, 1, (2, 120, 120, channels)).astype(np.float32) for _ in range(2))
    visible = np.zeros((2, 120, 120, 1), np.float32)
    visible[:, :60] = 1
    pasted = np.where(visible, original, predicted)
    sheet = draw_reconstructions(original, Reconstructions(predicted, pasted, visible), "a caption")
    shown = [c if channels >= 3 else 0 for c in range(3)]
    masked = np.where(visible, original, 0.5)
    for column, expected in enumerate((original, masked, predicted, pasted)):
        for row in range(2):
            x, y = 6 + column * 126, 22 + row * 126
            tile = sheet[y : y + 120, x : x + 120]
            np.testing.assert_allclose(tile / 255, expected[row][..., shown], atol=0.5 / 255 + 1e-6)
    assert len(HEADINGS) == 4 and sheet.shape[1] == 6 + 4 * 126


def test_small_pictures_are_enlarged_without_blur_and_a_long_caption_is_wrapped():
    image = np.zeros((1, 8, 8, 1), np.float32)
    image[0, 0, 0] = 1
    found = Reconstructions(image, image, np.ones_like(image))
    short, long = (draw_reconstructions(image, found, "word " * count) for count in (1, 200))
    tile = short[22 : 22 + 112, 6 : 6 + 112, 0]
    assert (tile[:14, :14] == 255).all() and (tile[14:] == 0).all() and (tile[:, 14:] == 0).all()
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0]
