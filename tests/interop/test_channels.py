"""Weights of a few channels start a model of other channels."""

import jax
import numpy as np
import pytest

from configs import digits
from mae_jax.interop.channels import adapt_channels
from mae_jax.interop.transfer import find_start, fitting_params, resolve_model
from mae_jax.interop.workdirs import Weights
from mae_jax.models.mae import MAEConfig, abstract_params, make_bind
from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import check
from mae_jax.training.step import TrainState
from tests.interop.test_transfer import save
from tests.reference import random_batch, random_params

SIZES = dict(width=16, depth=1, num_heads=2, decoder_width=8, decoder_depth=1, decoder_num_heads=2)


def weights_of(channels=3, **settings):
    config = digits.get_config()
    config.model.update(channels=channels, **SIZES, **settings)
    return Weights(config.to_dict(), random_params(MAEConfig(**config.model)), 7, "step 7")


def by_channel(x, channels):
    """[p*p, channels, ...] of the first layer's kernel, or of a column of the last layer's."""
    return np.asarray(x).reshape(4, channels, *x.shape[1:])


@pytest.mark.parametrize("how", ["mean", "repeat", (None, 2, 0, None, 1)])
def test_new_channels_get_the_mean_of_the_old_ones_or_repeat_them_or_get_those_that_are_named(how):
    weights = weights_of()
    found = adapt_channels(weights, 5, how, "here")
    old, new = (by_channel(w.params["encoder"]["patch_embed"]["kernel"], c) for w, c in ((weights, 3), (found, 5)))
    predictions = [(by_channel(w["kernel"].T, c), by_channel(w["bias"], c)) for w, c in (
        (weights.params["decoder"]["predict"], 3), (found.params["decoder"]["predict"], 5))]  # fmt: skip
    for n in range(5):
        place = how[n] if isinstance(how, tuple) else {"mean": None, "repeat": n % 3}[how]
        if isinstance(how, str):
            expected = (old.mean(1, dtype=np.float64) if place is None else old[:, place]) * 3 / 5
            np.testing.assert_allclose(new[:, n], expected, rtol=1e-6, atol=1e-8)
        else:
            np.testing.assert_array_equal(new[:, n], 0 if place is None else old[:, place])
        for before, after in zip(*predictions, strict=True):
            expected = before.mean(1, dtype=np.float64) if place is None else before[:, place]
            np.testing.assert_allclose(after[:, n], expected, rtol=1e-6, atol=1e-8)
    shapes = abstract_params(MAEConfig(**found.config["model"]))
    assert jax.tree.map(np.shape, found.params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert found.notes == (f"weights of 3 channels start a model of 5: init_channels={how}",)
    untouched = (w.params["encoder"]["blocks"] for w in (weights, found))
    jax.tree.map(np.testing.assert_array_equal, *untouched)
    assert weights.params["encoder"]["patch_embed"]["kernel"].shape[0] == 12


def test_a_model_of_named_channels_is_the_old_one_on_its_own_bands_whatever_the_others_show():
    weights = weights_of(normalize_targets=False)
    found = adapt_channels(weights, 5, (None, 2, 0, None, 1), "here")
    old, new = (make_bind(MAEConfig(**w.config["model"]))(w.params) for w in (weights, found))
    images, noise = random_batch(new.config, 3)
    expected = jax.jit(lambda x: old(x, noise=noise))(images[..., [2, 4, 1]])
    output = jax.jit(lambda x: new(x, noise=noise))(images)
    predicted = np.asarray(output.prediction).reshape(3, 16, 4, 5)[..., [2, 4, 1]]
    # The same terms and some zeros, which a matrix product may add in another order.
    np.testing.assert_allclose(predicted, np.reshape(expected.prediction, (3, 16, 4, 3)), rtol=0, atol=2e-6)


def test_a_target_that_is_fitted_to_old_channels_is_fitted_anew():
    weights = weights_of(normalize_targets=False, pca_targets=4)
    found = adapt_channels(weights, 5, "mean", "here")
    assert not {"basis", "predict"} & found.params["decoder"].keys() and "basis" in weights.params["decoder"]
    assert found.notes[1].startswith("the decoder's last layer starts from random weights")


@pytest.mark.parametrize(
    "channels, how, message",
    [
        (5, (0, 1, 2), "init_channels=(0, 1, 2) must have an entry for each of model.channels=5: a channel of "),
        (2, (0, 3), "a channel of init_from=here, from 0 to 2, or None"),
        (2, (0, -1), "a channel of init_from=here, from 0 to 2, or None"),
        (3, "mean", "init_channels='mean': init_from=here has model.channels=3 too: leave init_channels out"),
    ],
)
def test_what_does_not_fit_the_channels_is_refused_in_one_line(channels, how, message):
    with pytest.raises(UserError) as error:
        adapt_channels(weights_of(), channels, how, "here")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["median", 3, (), (0, "red"), (True, 0)])
def test_init_channels_that_mean_nothing_are_refused_with_an_example(value):
    config = digits.get_config()
    config.init_channels = value
    with pytest.raises(UserError, match=r"init_channels=.* must be mean, repeat, or .*--config.init_channels='\(2, 1"):
        check(config)


def test_other_channels_need_init_channels_and_then_the_values_of_pictures_are_the_runs_own(tmp_path):
    old = digits.get_config()
    old.model.update(channels=3, **SIZES)
    path = save(tmp_path / "old", old, 2, TrainState(0, random_params(MAEConfig(**old.model)), {}))
    config = digits.get_config()
    config.model.update(channels=5, **SIZES)
    config.data.update(mean=(900.0,), std=(300.0,), dtype="uint16")
    config.update(init_from=str(path), given=("model.channels",))
    trained, weights = find_start(config, tmp_path)
    with pytest.raises(UserError, match="model.channels=5 is 3 in the checkpoint .*--config.init_channels=mean"):
        resolve_model(config, trained)
    with pytest.raises(UserError, match=r"model.channels=3 \(here 5\); .*--config.init_channels=mean"):
        fitting_params(weights, config)

    config.init_channels = "repeat"
    trained, weights = find_start(config, tmp_path)
    assert resolve_model(config, trained) == [] and config.model.channels == 5
    assert (config.data.mean, config.data.std, config.data.dtype) == ((900.0,), (300.0,), "uint16")
    params, notes = fitting_params(weights, config)
    assert params["encoder"]["patch_embed"]["kernel"].shape == (20, 16)
    assert notes == ["weights of 3 channels start a model of 5: init_channels=repeat"]
