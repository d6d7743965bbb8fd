import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mae_jax
from configs import digits
from mae_jax.interop.transfer import fitting_params
from mae_jax.interop.weights import read_weights
from mae_jax.interop.workdirs import find_checkpoint
from mae_jax.models.classifier import (
    init_classifier,
    make_bind_classifier,
    make_classifier_config,
    split_classifier,
)
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.runtime.errors import UserError
from mae_jax.training.step import TrainState
from mae_jax.workdir.checkpoints import Checkpoints

SMALL = dict(width=16, depth=4, num_heads=2, decoder_width=8, decoder_depth=1, decoder_num_heads=2)
CONFIG = digits.get_config()
CONFIG.model.update(SMALL)
MODEL = MAEConfig(**CONFIG.model)


def encode(model, images):
    """Tokens, by one compiled program."""
    return jax.jit(model.encode)(images)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with checkpoints 1 and 12, of different parameters."""
    path = tmp_path_factory.mktemp("workdir")
    checkpoints = Checkpoints(path, CONFIG.checkpoint, CONFIG.to_dict())
    for step in (1, 12):
        params = init_params(MODEL, jax.random.key(step))
        checkpoints.save(step, TrainState(jnp.int32(step), params, {"count": jnp.int32(step)}))
    checkpoints.close()
    return path


def test_a_workdir_gives_its_newest_model_and_a_checkpoint_its_own(workdir):
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    for path, step in ((workdir, 12), (workdir / "checkpoints", 12), (workdir / "checkpoints" / "1", 1)):
        model = mae_jax.load(path)
        expected = make_bind(MODEL)(init_params(MODEL, jax.random.key(step)))
        jax.tree.map(
            np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(expected))
        )
    np.testing.assert_array_equal(encode(model, images), encode(expected, images))


def test_a_loaded_model_reconstructs_and_encodes_as_documented(workdir):
    model = mae_jax.load(str(workdir))
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    out = jax.jit(model.__call__)(images, key=jax.random.key(1))
    assert out.loss.shape == () and out.prediction.shape == (3, 16, 4)
    assert out.mask.shape == out.ids_restore.shape == (3, 16)
    assert encode(model, images).shape == (3, 17, 16)
    noise = np.random.default_rng(0).uniform(size=(3, 16))
    np.testing.assert_array_equal(
        np.argsort(noise, 1)[:, :4], np.argsort(jax.jit(model.__call__)(images, noise=noise).ids_restore)[:, :4]
    )


def test_a_checkpoint_that_was_moved_away_from_its_workdir_can_be_read(workdir, tmp_path):
    shutil.copytree(workdir / "checkpoints" / "12", tmp_path / "12")
    assert read_weights(tmp_path / "12").step == 12


def test_a_checkpoint_that_is_not_complete_is_not_found(workdir, tmp_path):
    shutil.copytree(workdir / "checkpoints" / "12", tmp_path / "checkpoints" / "20.orbax-checkpoint-tmp")
    with pytest.raises(UserError, match="neither a workdir"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("listed", [True, False])  # False: as earlier versions wrote them
@pytest.mark.parametrize("damage", ["about", "params"])
def test_a_damaged_checkpoint_is_one_clear_error(workdir, tmp_path, damage, listed):
    copy = tmp_path / "12"
    shutil.copytree(workdir / "checkpoints" / "12", copy)
    for file in (copy / damage).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    if not listed:
        (copy / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=f"is damaged: {damage}/" if listed else "cannot be read") as error:
        read_weights(copy)
    assert "\n" not in str(error.value)


def save_classifier(path, config, *, average=False):
    """A workdir with a checkpoint of step 5; returns (model's config, parameters, statistics) that were saved."""
    model = make_classifier_config(config.model, config.classifier)
    params, statistics = init_classifier(model, jax.random.key(3))
    statistics["head"]["batch_norm"]["mean"] += 0.5
    trained, frozen = split_classifier(model, params)
    state = TrainState(jnp.int32(5), trained, {"count": jnp.int32(5)}, frozen, statistics)
    if average:
        state = state._replace(average=jax.tree.map(lambda leaf: leaf + 1, trained))
    checkpoints = Checkpoints(path, config.checkpoint, config.to_dict())
    checkpoints.save(5, state)
    checkpoints.close()
    return model, params, statistics


def classifier_config():
    config = digits.get_config()
    config.task = "classify"
    config.model.update(SMALL)
    config.classifier.update(num_classes=10, pool="class", trained_blocks=1.0, batch_norm=True)
    return config


def test_a_classifier_is_put_together_from_its_frozen_and_trained_parts(tmp_path):
    model, params, statistics = save_classifier(tmp_path, classifier_config())
    weights = read_weights(tmp_path)
    expected = {"encoder": params["encoder"], "head": params["head"] | statistics["head"]}
    assert jax.tree.structure(weights.params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, weights.params, expected)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(weights.params))
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    loaded = mae_jax.load(tmp_path)
    logits = jax.jit(loaded.__call__)(images)
    np.testing.assert_array_equal(logits, jax.jit(make_bind_classifier(model)(expected).__call__)(images))
    assert logits.shape == (3, 10) and encode(loaded, images).shape == (3, 17, 16)


def test_the_moving_average_stands_for_the_parameters_where_there_is_one(tmp_path):
    _, params, _ = save_classifier(tmp_path, classifier_config(), average=True)
    found = read_weights(tmp_path).params
    np.testing.assert_array_equal(found["head"]["linear"]["kernel"], params["head"]["linear"]["kernel"] + 1)
    expected = np.array(params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"])
    expected[3] += 1  # the last block trains, the others have no average
    np.testing.assert_array_equal(found["encoder"]["blocks"]["mlp"]["fc1"]["kernel"], expected)
    np.testing.assert_array_equal(found["encoder"]["positions"], params["encoder"]["positions"])


def test_a_classifier_cannot_be_pre_trained_further(tmp_path):
    save_classifier(tmp_path, classifier_config())
    with pytest.raises(UserError, match="is a classifier without a decoder"):
        fitting_params(read_weights(tmp_path), CONFIG.to_dict())


def test_a_checkpoint_without_an_encoder_is_refused_in_one_line(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG.checkpoint, CONFIG.to_dict())
    checkpoints.save(1, TrainState(jnp.int32(1), {"decoder": {"kernel": jnp.ones(3)}}, {"count": jnp.int32(1)}))
    checkpoints.close()
    with pytest.raises(UserError, match="holds no encoder, only decoder") as error:
        read_weights(tmp_path)
    assert "\n" not in str(error.value)


def test_a_path_without_a_model_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="neither a workdir"):
        mae_jax.load(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        mae_jax.load(tmp_path / "nothing")


def test_weights_of_another_model_are_refused_with_the_settings_that_differ(workdir):
    other = digits.get_config()
    other.model.update(SMALL | dict(width=32, patch_size=4))
    with pytest.raises(UserError) as error:
        fitting_params(read_weights(workdir), json.loads(json.dumps(other.to_dict())))
    assert "model.width=16 (here 32)" in str(error.value) and "model.patch_size=2 (here 4)" in str(error.value)
    assert "depth" not in str(error.value)


def test_a_checkpoint_of_an_earlier_version_has_the_same_weights(workdir, tmp_path):
    params = read_weights(workdir).params
    earlier = jax.tree_util.tree_map_with_path(
        # Queries, keys and values stood side by side.
        lambda path, leaf: leaf.reshape(*leaf.shape[:-2], -1) if path[-2].key == "qkv" else leaf,
        params,
    )
    checkpoints = Checkpoints(tmp_path, CONFIG.checkpoint, CONFIG.to_dict())
    checkpoints.save(3, TrainState(jnp.int32(3), earlier, {"count": jnp.int32(3)}))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path).params, params)
