import jax
import numpy as np
import pytest

from configs import digits
from mae_jax.data.augment import normalize
from mae_jax.data.datasets import make_source
from mae_jax.evaluation.pretraining import MAEEvaluation
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from tests.meshes import device_mesh


def make_evaluation(devices=1, loss_patches="hidden", **evaluate):
    config = digits.get_config()
    config.model.update(width=16, depth=1, num_heads=2, decoder_width=16, decoder_depth=1, decoder_num_heads=2)
    config.model.loss_patches = loss_patches
    config.evaluate.update(evaluate)
    model = MAEConfig(**config.model)
    mesh = device_mesh(devices)
    sources = [make_source(config.data, split, model.image_size, model.channels) for split in ("train", "eval")]
    return MAEEvaluation(config, model, mesh, *sources), config, model, sources


@pytest.fixture(scope="module")
def params():
    return init_params(make_evaluation()[2], jax.random.key(0))


def test_the_loss_counts_every_image_once_for_any_batch_size_and_number_of_devices(params):
    evaluation, config, model, (_, source) = make_evaluation(batch_size=360)
    images = normalize(np.stack([source[i]["image"] for i in range(360)]), config.data.mean, config.data.std)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2), i))(np.arange(360))
    expected = np.mean(np.asarray(make_bind(model)(params)(images, key=keys).example_loss, np.float64))
    # One float32 sum over at most 360 values apart from each other.
    assert evaluation.loss(params) == pytest.approx(expected, rel=1e-6)
    for devices, batch_size in ((1, 100), (8, 100)):
        other = make_evaluation(devices, batch_size=batch_size)[0]
        assert other.loss(params) == pytest.approx(expected, rel=1e-6)


def test_features_are_the_same_on_eight_devices(params):
    one, eight = (make_evaluation(devices, max_train_examples=300)[0] for devices in (1, 8))
    # Accuracies are the same to the last image; RankMe is as exact as float32 features.
    assert one.features(params) == pytest.approx(eight.features(params), rel=1e-6)


def test_the_mask_ratio_of_the_evaluation_can_be_set_apart_from_the_models(params):
    picture = make_evaluation(mask_ratio=0.25)[0].picture(params, "x")
    hidden = np.mean(picture[22:-30, 124:236] == 128)  # grey, in the column of masked pictures
    assert 0.1 < hidden < 0.4


@pytest.mark.parametrize("loss_patches, told", [("hidden", True), ("all", False)])
def test_the_picture_says_why_visible_patches_of_a_prediction_are_noise_where_they_are(
    params, monkeypatch, loss_patches, told
):
    captions = []
    monkeypatch.setattr(
        "mae_jax.evaluation.pretraining.draw_reconstructions", lambda images, found, caption: captions.append(caption)
    )
    make_evaluation(loss_patches=loss_patches)[0].picture(params, "step 0")
    assert ("visible patches of a prediction are noise: the loss is on the hidden ones alone" in captions[0]) == told


def test_the_loss_is_said_to_be_of_the_hidden_patches_only_where_some_are_hidden(tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((4, 4)))
    np.save(tmp_path / "some.npy", np.eye(4))
    found = [make_evaluation(mask_ratio=ratio)[0].counted for ratio in (None, 0.25, 0.0)]
    found += [make_evaluation(mask=f"{tmp_path}/{name}.npy")[0].counted for name in ("some", "none")]
    assert found == ["the hidden", "the hidden", "all", "the hidden", "all"]


def test_a_subset_of_the_training_images_is_random_fixed_and_told(params):
    evaluation = make_evaluation(max_train_examples=100)[0]
    again = make_evaluation(max_train_examples=100)[0]
    labels = [evaluation.train_source[i]["label"] for i in range(100)]
    assert labels == [again.train_source[i]["label"] for i in range(100)]
    assert len(evaluation.train_source) == 100 and len(set(labels)) == 10
    assert "100 training images in digits train, 360 evaluation images in digits eval" in evaluation.protocol
