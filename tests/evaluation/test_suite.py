"""The evaluators of pre-training, on the digits and on features made up."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits
from mae_jax.data.augment import normalize
from mae_jax.data.sources import Digits
from mae_jax.evaluation import autoencoder
from mae_jax.evaluation.evaluator import EvaluationData, EvaluationSuite, Evaluator, Trained
from mae_jax.evaluation.features import rankme
from mae_jax.models.mae import init_params, make_bind
from mae_jax.runtime.errors import UserError
from tests.meshes import device_mesh

FEATURES = ("knn", "rankme", "linear_probe")


def make_suite(*names, devices=1, loss_patches="hidden", **evaluate):
    config = digits.get_config()
    config.model.update(width=16, depth=1, num_heads=2, decoder_width=16, decoder_depth=1, decoder_num_heads=2)
    config.model.loss_patches = loss_patches
    config.evaluate.update(evaluate)
    data = EvaluationData(
        config, lambda x: make_bind(data.model)(x), device_mesh(devices), Digits("train"), Digits("eval")
    )
    return EvaluationSuite(config, data, names)


@pytest.fixture(scope="module")
def state():
    return Trained(3, init_params(make_suite().data.model, jax.random.key(0)), "step 3")


def test_the_loss_counts_every_image_once_for_any_batch_size_and_number_of_devices(state):
    suite = make_suite("loss", batch_size=360)
    source, data = suite.data.evaluation, suite.data.config.data
    images = normalize(np.stack([source[i]["image"] for i in range(360)]), data)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 2), i))(np.arange(360))
    expected = np.mean(np.asarray(suite.data.bind(state.values)(images, key=keys).example_loss, np.float64))
    # One float32 sum over at most 360 values apart from each other.
    assert suite.run(state) == ({"loss": pytest.approx(expected, rel=1e-6)}, {})
    for devices, batch_size in ((1, 100), (8, 100)):
        other = make_suite("loss", devices=devices, batch_size=batch_size)
        assert other.run(state)[0]["loss"] == pytest.approx(expected, rel=1e-6)


def test_features_are_the_same_on_eight_devices_and_extracted_once_for_a_state(state, monkeypatch):
    one, eight = (make_suite(*FEATURES, devices=devices, max_train_examples=300) for devices in (1, 8))
    extracted, extract = [], EvaluationData.extract
    monkeypatch.setattr(EvaluationData, "extract", lambda *args: extracted.append(args[2]) or extract(*args))
    # Accuracies are the same to the last image; RankMe is as exact as float32 features.
    assert one.run(state)[0] == pytest.approx(eight.run(state)[0], rel=1e-6)
    assert extracted == [x for suite in (one, eight) for x in (suite.data.train, suite.data.evaluation)]


def test_the_mask_ratio_of_the_evaluation_can_be_set_apart_from_the_models(state):
    picture = make_suite("reconstructions", mask_ratio=0.25).run(state)[1]["reconstructions"]
    hidden = np.mean(picture[22:-30, 124:236] == 128)  # grey, in the column of masked pictures
    assert 0.1 < hidden < 0.4


@pytest.mark.parametrize("loss_patches, told", [("hidden", True), ("all", False)])
def test_the_picture_says_why_visible_patches_of_a_prediction_are_noise_where_they_are(
    state, monkeypatch, loss_patches, told
):
    captions, picture = [], np.zeros((2, 2, 3), np.uint8)
    monkeypatch.setattr(autoencoder, "draw_reconstructions", lambda *drawn: captions.append(drawn[2]) or picture)
    assert make_suite("reconstructions", loss_patches=loss_patches).run(state) == ({}, {"reconstructions": picture})
    assert captions[0].startswith("step 3; 75% of the patches hidden")
    assert ("visible patches of a prediction are noise: the loss covers the hidden patches only" in captions[0]) == told


def test_the_loss_is_said_to_be_of_the_hidden_patches_only_where_some_are_hidden(tmp_path):
    np.save(tmp_path / "none.npy", np.zeros((4, 4)))
    np.save(tmp_path / "some.npy", np.eye(4))
    settings = [dict(mask_ratio=ratio) for ratio in (None, 0.25, 0.0)]
    settings += [dict(mask=f"{tmp_path}/{name}.npy") for name in ("some", "none")]
    found = [make_suite(**some).data.hidden_patches.counted for some in settings]
    assert found == ["the hidden", "the hidden", "all", "the hidden", "all"]


def test_a_subset_of_the_training_images_is_random_fixed_and_told():
    suite, again = (make_suite("knn", max_train_examples=100) for _ in range(2))
    labels = [suite.data.train[i]["label"] for i in range(100)]
    assert labels == [again.data.train[i]["label"] for i in range(100)]
    assert len(suite.data.train) == 100 and len(set(labels)) == 10
    assert "100 training images in digits train, 360 evaluation images in digits eval" in suite.protocol


def test_separable_classes_are_told_apart_and_shuffled_labels_are_not():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=400)
    features = (4 * np.eye(4)[labels] + rng.normal(size=(400, 4))).astype(np.float32)
    test = features[200:], labels[200:]

    def measure(train_labels, **settings):
        known = {"train": (features[:200], train_labels), "evaluation": test}
        data = SimpleNamespace(
            features=lambda _, split: known[split], labelled=True, mesh=device_mesh(), forget=lambda: None,
            train=SimpleNamespace(label_kind="class", num_classes=4),
        )  # fmt: skip
        settings = dict(knn_k=3, knn_temperature=0.07, linear_probe=True, probe_c=1.0) | settings
        return EvaluationSuite(ConfigDict({"evaluate": settings}), data, FEATURES).run(None)[0]

    scores = measure(labels[:200])
    assert scores["knn/top1"] > 0.9 and scores["linear_probe/top1"] > 0.9
    assert scores["rankme"] == rankme(features[:200])
    assert measure(labels[:200], linear_probe=False) == {name: scores[name] for name in ("knn/top1", "rankme")}
    chance = measure(rng.permutation(labels[:200]))
    assert chance["knn/top1"] < 0.45 and chance["linear_probe/top1"] < 0.45


class Noisy(Evaluator):
    def run(self, state):
        yield "loss", state
        yield "more", 1.0
        yield "picture", np.zeros((2, 2, 3), np.uint8)


def test_numbers_and_pictures_are_told_apart_and_nothing_follows_a_loss_that_is_not_finite():
    suite = make_suite(f"{__name__}:Noisy")
    numbers, pictures = suite.run(2)
    assert numbers == {"loss": 2.0, "more": 1.0} and pictures.keys() == {"picture"}
    numbers, pictures = suite.run(float("nan"))
    assert np.isnan(numbers["loss"]) and len(numbers) == 1 and pictures == {}
    assert suite.run(2, features_only=True) == ({}, {})


def test_an_evaluator_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="evaluate.evaluators='k-nn' is not one of .*knn"):
        make_suite("k-nn")
