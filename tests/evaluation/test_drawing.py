import numpy as np
import pytest

from mae_jax.evaluation.autoencoder import HEADINGS, draw_reconstructions
from mae_jax.models.targets import Reconstructions


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
