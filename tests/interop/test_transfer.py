import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from mae_jax.interop.transfer import describe_start, find_start, keeps_head, resolve_model, starting_params
from mae_jax.models.classifier import init_classifier, make_classifier_config, split_classifier
from mae_jax.models.mae import MAEConfig
from mae_jax.models.positions import resize_positions
from mae_jax.runtime.errors import UserError
from mae_jax.training.step import TrainState
from mae_jax.workdir.checkpoints import Checkpoints
from tests.reference import loop_positions, random_like, random_params


def save(path, config, step, state):
    checkpoints = Checkpoints(path, config.checkpoint, config.to_dict())
    checkpoints.save(step, state._replace(step=jnp.int32(step), opt_state={"count": jnp.int32(step)}))
    checkpoints.close()
    return path


def small(task="classify", **classifier):
    config = digits.get_config()
    config.task = task
    config.model.update(width=16, depth=2, num_heads=2, decoder_width=8, decoder_depth=1, decoder_num_heads=2)
    config.classifier.update({"num_classes": 10, "pool": "class", **classifier})
    return config


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """(workdir of a pre-trained model, its parameters)."""
    config = small("pretrain")
    params = random_params(MAEConfig(**config.model))
    return save(tmp_path_factory.mktemp("autoencoder"), config, 12, TrainState(0, params, {})), params


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """(workdir of a classifier of 10 classes with BatchNorm, its parameters, its statistics)."""
    config = small(batch_norm=True, trained_blocks=1.0)
    model = make_classifier_config(config.model, config.classifier)
    params, statistics = (random_like(t, 1) for t in jax.eval_shape(lambda: init_classifier(model, jax.random.key(0))))
    trained, frozen = split_classifier(model, params)
    state = TrainState(0, trained, {}, frozen, statistics)
    return save(tmp_path_factory.mktemp("classifier"), config, 7, state), params, statistics


def begin(config, path, workdir):
    """(model, weights) of a run with this config that begins with a checkpoint."""
    config.init_from = str(path)
    trained, weights = find_start(config, workdir)
    resolve_model(config, trained)
    return make_classifier_config(config.model, config.classifier), weights


def test_the_encoders_sizes_are_the_checkpoints_and_what_is_given_and_compute_are_the_runs_own(autoencoder, tmp_path):
    config = small()
    config.given = ("model.image_size",)
    config.model.update(width=768, depth=12, num_heads=12, patch_size=4, norm_epsilon=1e-3, mlp_ratio=2.0)
    config.model.update(image_size=16, dtype="bfloat16", remat=True, scan_unroll=1)
    model, weights = begin(config, autoencoder[0], tmp_path)
    assert (model.encoder.width, model.encoder.depth, model.encoder.num_heads) == (16, 2, 2)
    assert (model.encoder.patch_size, model.encoder.norm_epsilon, model.encoder.mlp_ratio) == (2, 1e-6, 4.0)
    assert (model.encoder.image_size, model.encoder.dtype) == ((16, 16), "bfloat16")
    assert (model.encoder.remat, model.encoder.scan_unroll) == (True, 1)
    assert weights.step == 12


def test_a_run_that_goes_on_has_the_sizes_of_its_own_checkpoint_and_begins_with_no_other(autoencoder, classifier):
    config = small()
    config.model.width = 768
    config.init_from = str(autoencoder[0])
    trained, weights = find_start(config, classifier[0])
    changed = resolve_model(config, trained)
    assert weights is None and changed == ["model.width is 16, the checkpoint's, not 768"]
    assert config.model.width == 16


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(tmp_path):
    assert find_start(small(), tmp_path) == (None, None)


@pytest.mark.parametrize("pool", ["class", "mean", "attentive", "abmilp", "mean_norm"])
def test_a_classifier_takes_the_encoder_of_an_autoencoder_and_its_table_of_positions(autoencoder, tmp_path, pool):
    config = small(pool=pool)
    model, weights = begin(config, autoencoder[0], tmp_path)
    found = starting_params(weights, model)
    assert found.keys() == {"encoder"}
    encoder, expected = dict(found["encoder"]), dict(autoencoder[1]["encoder"])
    # The table in float32: half a rounding of 1.
    np.testing.assert_allclose(encoder.pop("positions"), loop_positions(4, 4, 16), rtol=0, atol=6e-8)
    if pool == "mean_norm":  # there the norm follows the pool: it is new
        expected["norm"] = {"scale": np.ones(16), "bias": np.zeros(16)}
    jax.tree.map(np.testing.assert_array_equal, encoder, expected)
    assert describe_start(weights, model, config) == f"{autoencoder[0]}, step 12 (pretrain)"


def test_what_is_taken_over_fits_the_model_and_leaves_the_checkpoints_weights_alone(autoencoder, tmp_path):
    model, weights = begin(small(pool="mean_norm"), autoencoder[0], tmp_path)
    found = starting_params(weights, model)
    expected = jax.eval_shape(lambda: init_classifier(model, jax.random.key(0))[0])["encoder"]
    assert jax.tree.map(lambda leaf: leaf.shape, found["encoder"]) == jax.tree.map(lambda leaf: leaf.shape, expected)
    jax.tree.map(np.testing.assert_array_equal, weights.params, autoencoder[1])


def test_the_table_for_larger_images_is_the_pre_trained_one_resized(autoencoder, tmp_path):
    config = small()
    config.given, config.model.image_size = ("model.image_size",), (12, 16)
    model, weights = begin(config, autoencoder[0], tmp_path)
    found = starting_params(weights, model)["encoder"]["positions"]
    expected = resize_positions(loop_positions(4, 4, 16), (4, 4), (6, 8))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(found - loop_positions(6, 8, 16)).max() > 0.1  # which is not the formula's
    assert describe_start(weights, model, config).endswith("; positions resized from 4 x 4 patches")


def test_learned_positions_are_taken_over_and_resized(classifier, tmp_path):
    learned = classifier[1]["encoder"]["positions"]
    model, weights = begin(small(), classifier[0], tmp_path)
    np.testing.assert_array_equal(starting_params(weights, model)["encoder"]["positions"], learned)
    config = small()
    config.given, config.model.image_size = ("model.image_size",), 12
    model, weights = begin(config, classifier[0], tmp_path)
    found = starting_params(weights, model)["encoder"]["positions"]
    np.testing.assert_allclose(found, resize_positions(learned, (4, 4), (6, 6)), rtol=0, atol=1e-6)


def test_a_head_of_the_same_kind_is_kept_with_its_statistics(classifier, tmp_path):
    config = small(batch_norm=True)
    model, weights = begin(config, classifier[0], tmp_path)
    _, params, statistics = classifier
    found = starting_params(weights, model)
    jax.tree.map(np.testing.assert_array_equal, found["head"], params["head"] | statistics["head"])
    jax.tree.map(np.testing.assert_array_equal, found["encoder"], params["encoder"])
    assert describe_start(weights, model, config) == f"{classifier[0]}, step 7 (classify), with its head"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_classes": 3, "batch_norm": True}, "a new head: the checkpoint's has 10 classes, the data have 3"),
        ({"batch_norm": False}, "a new head: the checkpoint's has other classes, or another pool or norm"),
        (
            {"batch_norm": True, "pool": "mean"},
            "a new head: the checkpoint's has other classes, or another pool or norm",
        ),
    ],
)
def test_a_head_of_another_kind_is_new_and_the_reason_is_told(classifier, tmp_path, changes, text):
    config = small(**changes)
    model, weights = begin(config, classifier[0], tmp_path)
    assert not keeps_head(weights, model)
    found = starting_params(weights, model)
    assert found.keys() == {"encoder"}
    jax.tree.map(np.testing.assert_array_equal, found["encoder"]["norm"], classifier[1]["encoder"]["norm"])
    assert text in describe_start(weights, model, config)


def test_another_normalisation_of_the_pictures_is_noted(autoencoder, tmp_path):
    config = small()
    config.given = ("data.mean",)
    config.data.update(mean=(0.5,), std=(0.376,))
    model, weights = begin(config, autoencoder[0], tmp_path)
    text = describe_start(weights, model, config)
    assert text.endswith("; note: data.mean was (0.305,), is (0.5,)")


def test_a_checkpoint_without_an_encoder_is_refused_in_one_line(tmp_path):
    config = small()
    save(tmp_path / "other", config, 1, TrainState(0, {"head": {"kernel": jnp.ones(3)}}, {}))
    with pytest.raises(UserError, match="holds no encoder, only head") as error:
        begin(config, tmp_path / "other", tmp_path)
    assert "\n" not in str(error.value)


def test_the_size_and_the_values_of_pictures_are_the_checkpoints_unless_the_command_line_gives_them(
    autoencoder, tmp_path
):
    def found(*given):
        config = small()
        config.model.update(image_size=224)
        config.data.update(mean=(0.5, 0.5, 0.5), std=(0.5,), value_range=(0, 4095))
        config.given = given
        config.init_from = str(autoencoder[0])
        changed = resolve_model(config, find_start(config, tmp_path)[0])
        assert len(changed) == 4 - len(given)
        return config.model.image_size, config.data.mean, config.data.std, config.data.value_range

    assert found() == (8, (0.305,), (0.376,), None)
    assert found("model.image_size") == (224, (0.305,), (0.376,), None)
    assert found("data.mean", "data.value_range") == (8, (0.5, 0.5, 0.5), (0.376,), (0, 4095))


def test_a_checkpoint_of_its_own_that_cannot_be_read_leaves_a_run_to_begin_again(autoencoder, tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    config = small()
    config.init_from = str(autoencoder[0])
    assert find_start(config, tmp_path)[1].step == 12
