import numpy as np
import pytest

from configs.common import get_config
from mae_jax.evaluation.autoencoder import HEADINGS, draw_reconstructions
from mae_jax.evaluation.drawing import drawn_channels, find_stretch
from mae_jax.models.targets import Reconstructions
from mae_jax.runtime.errors import UserError


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


def test_pixels_without_data_have_one_colour_in_every_column():
    images, valid = np.zeros((1, 112, 112, 3), np.float32), np.ones((1, 112, 112, 1), bool)
    valid[:, :50, :50] = False
    sheet = draw_reconstructions(images, Reconstructions(images, images, np.ones_like(images[..., :1])), "", valid)
    for column in range(4):
        tile = sheet[22 : 22 + 112, 6 + 118 * column : 118 + 118 * column]
        assert (tile[:50, :50] == 217).all() and (tile[50:] == 0).all() and (tile[:, 50:] == 0).all()


@pytest.mark.parametrize(
    "channels, settings, given, expected",
    [
        (3, {}, None, None), (1, {}, None, None), (3, {"dtype": "uint8"}, None, None),
        (3, {"dtype": "uint16"}, None, [0, 1, 2]), (1, {"value_range": (0, 99)}, None, [0]), (2, {}, None, [0]),
        (13, {}, None, [0, 1, 2]), (13, {}, (3, 2, 1), [3, 2, 1]), (13, {}, (12,), [12]), (3, {}, [2, 1, 0], [2, 1, 0]),
    ],
)  # fmt: skip
def test_grey_and_rgb_pictures_of_8_bits_are_drawn_as_they_are_and_of_others_some_channels(
    channels, settings, given, expected
):
    config = get_config()
    config.data.update(settings)
    config.evaluate.shown_channels = given
    assert drawn_channels(config, channels) == expected


@pytest.mark.parametrize("given", [(0, 1), (0, 1, 13), (-1,), (True,), ("red",), "red", ()])
def test_channels_that_cannot_be_drawn_are_refused(given):
    config = get_config()
    config.evaluate.shown_channels = given
    with pytest.raises(UserError, match="evaluate.shown_channels=.* three channels, .* or one, from 0 to 12"):
        drawn_channels(config, 13)


@pytest.mark.parametrize("channels", [[3, 2, 1], [4]])
def test_channels_are_stretched_to_percentiles_of_the_originals_and_words_say_so(channels):
    rng = np.random.default_rng(0)
    images, predicted = (rng.normal(0.3, 0.1, (2, 20, 20, 5)).astype(np.float32) for _ in range(2))
    valid = rng.random(images.shape) < 0.8
    images[~valid] = 7  # no data
    stretch, words = find_stretch(images, valid, channels, (1000, 3000))
    ends = [np.percentile(images[..., n][valid[..., n]].astype(np.float64), [2, 98]) for n in channels]
    for i, (n, (low, high)) in enumerate(zip(channels, ends, strict=True)):
        for x in (images, predicted):
            np.testing.assert_allclose(stretch(x)[..., i], (x[..., n] - low) / (high - low), rtol=1e-4, atol=1e-4)
    limits = ", ".join(f"{1000 + 2000 * low:.5g} to {1000 + 2000 * high:.5g}" for low, high in ends)
    start = "channels 3, 2, 1 as red, green, blue, each" if len(channels) == 3 else "channel 4 as grey,"
    assert words == f"{start} from its 2nd to its 98th percentile ({limits})"


def test_channels_that_do_not_vary_or_have_no_data_are_drawn_too():
    images, valid = np.full((1, 4, 4, 3), 5.0), np.ones((1, 4, 4, 3), bool)
    valid[..., 1] = False
    stretch, words = find_stretch(images, valid, [0, 1, 2])
    assert np.isfinite(stretch(images)).all() and words.endswith("(5 to 5, 0 to 1, 5 to 5)")
