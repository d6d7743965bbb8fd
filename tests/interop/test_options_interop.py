"""Weights of models with options: into other programs' files, other sizes, and other runs."""

import jax
import numpy as np
import pytest

from configs import digits
from mae_jax.interop.formats import WEIGHTS, fit
from mae_jax.interop.transfer import find_start, fitting_params, resolve_model, starting_params
from mae_jax.interop.weights import choose, make_bind_of, read_weights
from mae_jax.models.classifier import make_classifier_config
from mae_jax.models.mae import MAEConfig, split_fixed
from mae_jax.runtime.errors import UserError
from mae_jax.training.step import TrainState
from mae_jax.workdir.checkpoints import Checkpoints
from tests.interop.others import check_same_params, our_classifier, our_weights
from tests.interop.test_formats import written
from tests.reference import random_params

pytestmark = pytest.mark.filterwarnings("ignore:.*(mean and std|left over|no decoder)")

# ----------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("format", WEIGHTS)
@pytest.mark.parametrize("option, value", [("class_tokens", 2), ("registers", 4), ("qk_norm", True)])
def test_no_other_program_gets_an_encoder_that_it_does_not_know(format, option, value):
    for weights, only in ((our_weights(**{option: value}), False), (our_weights(**{option: value}), True)):
        with pytest.raises(UserError, match=f"model.{option}={value}: no other program has such models") as error:
            fit(weights, format, encoder_only=only)
        assert "\n" not in str(error.value) and "encoder_only" not in str(error.value)
    with pytest.raises(UserError, match=f"model.{option}={value}"):
        fit(our_classifier("class", **{option: value}), format)


OURS_ALONE = {
    "decoder_attention": dict(decoder_attention="cross"),
    "encoder_mask_tokens": dict(encoder_mask_tokens=True),
    "pca_targets": dict(pca_targets=5, normalize_targets=False),
}


@pytest.mark.parametrize("option", OURS_ALONE)
@pytest.mark.parametrize("format", ["huggingface", "facebook"])
def test_a_decoder_that_no_other_program_knows_is_refused_and_its_encoder_is_not(option, format, tmp_path):
    weights = our_weights(**OURS_ALONE[option])
    with pytest.raises(UserError, match=f"model.{option}=.*export the encoder: --config.encoder_only=True"):
        fit(weights, format)
    found = written(weights, tmp_path, format, encoder_only=True)
    check_same_params(found.params, {"encoder": weights.params["encoder"]})
    images = np.random.default_rng(0).normal(size=(2, *MAEConfig(**weights.config["model"]).image_size, 3))
    features = [make_bind_of(w)(jax.device_put(w.params)).encode(images.astype(np.float32)) for w in (found, weights)]
    np.testing.assert_array_equal(*features)


def test_timms_encoder_of_a_cross_model_needs_no_asking(tmp_path):
    weights = our_weights(decoder_attention="cross")
    check_same_params(written(weights, tmp_path, "timm").params, {"encoder": weights.params["encoder"]})


@pytest.mark.parametrize("options", [dict(loss_patches="all"), dict(mask_sampling="block"), dict(masks_per_image=2)])
def test_settings_of_training_alone_are_no_obstacle_to_an_export(options, tmp_path):
    weights = our_weights(**options)
    check_same_params(written(weights, tmp_path, "huggingface").params, weights.params)


# ------------------------------------------------------------------------------------------------------ other sizes

CELLS = dict(image_size=(8, 8), patch_size=2, mask_cell=2, mask_ratio=0.75)
PARTS = dict(image_size=(8, 8), patch_size=2, decoder_attention="cross", prediction_ratio=0.75, mask_ratio=0.75)


def test_a_size_that_the_masks_do_not_fit_is_told_and_masks_are_of_single_patches_there():
    chosen = choose(our_weights(**CELLS), {"image_size": (6, 10)})
    assert chosen.notes == (
        "model.mask_cell=2 does not divide the grid of 3 x 5 patches; masks hide single random patches instead",
    )
    assert chosen.config["model"]["mask_cell"] == 1 and chosen.config["model"]["mask_ratio"] == 0.75
    fitting = choose(our_weights(**CELLS), {"image_size": (16, 24)})
    assert fitting.notes == () and fitting.config["model"]["mask_cell"] == 2
    grid = choose(our_weights(**CELLS | dict(mask_cell=1, mask_sampling="grid")), {"mask_ratio": 0.5})
    assert grid.config["model"]["mask_sampling"] == "random" and "needs model.mask_ratio=0.75" in grid.notes[0]
    unchanged = our_weights(**CELLS)
    assert choose(unchanged, {"dtype": "bfloat16"}).config["model"] == unchanged.config["model"] | {"dtype": "bfloat16"}


def test_the_share_of_patches_that_training_predicted_restricts_no_later_mask_ratio():
    chosen = choose(our_weights(**PARTS), {"mask_ratio": 0.5})
    assert chosen.notes == () and MAEConfig(**chosen.config["model"]).num_visible() == 8


def test_a_size_that_makes_no_model_is_still_refused_by_its_own_name():
    with pytest.raises(UserError, match="patch size 2 does not divide the image size 9 x 8"):
        choose(our_weights(**CELLS), {"image_size": (9, 8)})


# ------------------------------------------------------------------------------------------------------- other runs


def config_of(task="pretrain", **model):
    config = digits.get_config()
    config.task = task
    config.model.update(width=16, depth=2, num_heads=2, decoder_width=8, decoder_depth=1, decoder_num_heads=2, **model)
    config.classifier.update(num_classes=10, pool="class")
    return config


def save(path, config, step=5):
    model = MAEConfig(**config.model)
    params, fixed = split_fixed(model, random_params(model))
    checkpoints = Checkpoints(path, config.checkpoint, config.to_dict())
    checkpoints.save(step, TrainState(np.int32(step), params, {"count": np.int32(step)}, fixed))
    checkpoints.close()
    (path.parent / "new").mkdir()
    return path


def test_a_classifier_of_another_size_begins_with_an_encoder_whose_masks_would_not_fit(tmp_path):
    path = save(tmp_path / "cells", config_of(mask_cell=2, class_tokens=3, registers=2, qk_norm=True))
    config = config_of("classify", image_size=10)
    config.init_from, config.given = str(path), ("model.image_size",)
    trained, weights = find_start(config, tmp_path / "new")
    changed = resolve_model(config, trained)
    assert changed == [
        "model.class_tokens is 3, the checkpoint's, not 1", "model.registers is 2, the checkpoint's, not 0",
        "model.qk_norm is True, the checkpoint's, not False",
    ]  # fmt: skip
    model = make_classifier_config(config.model, config.classifier)
    assert (model.encoder.grid, model.encoder.class_tokens, model.encoder.registers) == ((5, 5), 3, 2)
    start = starting_params(weights, model)["encoder"]
    for name in ("class_token", "registers"):
        np.testing.assert_array_equal(start[name], weights.params["encoder"][name])
    assert "q_norm" in start["blocks"]["attention"]


def test_a_checkpoint_of_a_version_without_the_options_has_none_of_them(tmp_path):
    config = config_of()
    described = config.to_dict()
    for name in ("class_tokens", "registers", "qk_norm", "mask_sampling", "uniformity"):
        del described["model"][name]
    checkpoints = Checkpoints(tmp_path / "old", config.checkpoint, described)
    params = random_params(MAEConfig(**config.model))
    checkpoints.save(5, TrainState(np.int32(5), params, {"count": np.int32(5)}))
    checkpoints.close()
    (tmp_path / "new").mkdir()
    new = config_of("classify", registers=4)
    new.init_from = str(tmp_path / "old")
    changed = resolve_model(new, find_start(new, tmp_path / "new")[0])
    assert changed == ["model.registers is 0, the checkpoint's, not 4"] and new.model.registers == 0


@pytest.mark.parametrize("option", ["class_tokens", "registers", "qk_norm", "decoder_attention", "encoder_mask_tokens"])
def test_pre_training_goes_on_from_a_model_of_the_same_options_only(option, tmp_path):
    value = {"qk_norm": True, "decoder_attention": "cross", "encoder_mask_tokens": True}.get(option, 2)
    path = save(tmp_path / "plain", config_of())
    with pytest.raises(UserError, match=rf"model.{option}=.* \(here {value!r}\); make these settings the same"):
        fitting_params(read_weights(path), config_of(**{option: value}).to_dict())


def test_pre_training_may_go_on_with_other_masks_and_at_a_size_that_the_earlier_ones_do_not_fit(tmp_path):
    path = save(tmp_path / "cells", config_of(mask_cell=2, decoder_attention="cross", prediction_ratio=0.5))
    new = config_of(image_size=10, mask_sampling="block", decoder_attention="cross", prediction_ratio=0.25)
    params, notes = fitting_params(read_weights(path), new.to_dict())
    assert notes == []
    check_same_params(params, read_weights(path).params)
