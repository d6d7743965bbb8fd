import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import mae_jax
from configs import common, digits
from mae_jax.data.augment import normalize
from mae_jax.data.sources import Digits
from mae_jax.interop.weights import read_weights
from mae_jax.interop.workdirs import find_checkpoint
from tests.runs import mistake, read_checkpoint, read_json, run_task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def leaves(workdir):
    params = read_weights(workdir).params
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_fine_tuning_trains_everything_and_reports_as_pre_training_does(finetuned, pretrained):
    result = read_json(finetuned / "result.json")
    assert {"step", "eval/loss", "eval/top1", "eval/top5", "eval/balanced_accuracy", "protocol"} == result.keys()
    lines = [json.loads(line) for line in (finetuned / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "images_per_second", "data_wait_fraction"} < set(
        lines[0]
    )
    before, after = leaves(pretrained), leaves(finetuned)
    assert {name for name in after if name in before and np.array_equal(before[name], after[name])} == set()
    assert not any("decoder" in name for name in after)


def test_the_average_is_saved_evaluated_and_loaded(finetuned):
    saved = read_checkpoint(finetuned, 6)
    average = find_checkpoint(finetuned) / "average"
    assert average.is_dir()
    loaded = leaves(finetuned)["['head']['linear']['kernel']"]
    assert not np.array_equal(loaded, saved["params['head']['linear']['kernel']"])


@pytest.mark.parametrize("trained_blocks", [0.0, 0.5, 1.0])
def test_frozen_parameters_end_with_the_bits_that_they_began_with(pretrained, tmp_path, trained_blocks):
    settings = dict(init_from=str(pretrained), classifier__trained_blocks=trained_blocks, train__steps=3)
    workdir = run_task("finetune_digits", tmp_path / "partial", **settings)
    before, after = leaves(pretrained), leaves(workdir)
    moved = {name for name in after if name in before and not np.array_equal(before[name], after[name])}
    blocks = {name for name in after if "blocks" in name}
    for name in blocks:  # the first of two blocks is frozen in all three
        np.testing.assert_array_equal(before[name][0], after[name][0])
    second_half = {name for name in blocks if "norm2" in name or "mlp" in name}
    norm = {"['encoder']['norm']['scale']", "['encoder']['norm']['bias']"}
    assert moved == norm | {0.0: set(), 0.5: second_half, 1.0: blocks}[trained_blocks]


def test_a_probe_on_kept_features_is_the_probe_on_pictures(pretrained, tmp_path, monkeypatch, capsys):
    settings = dict(init_from=str(pretrained), train__log_every_steps=1)
    kept = run_task("linear_probe_digits", tmp_path / "kept", **settings)
    assert "computed once" in capsys.readouterr().out
    monkeypatch.setattr("mae_jax.objectives.classify.KEPT_FEATURES_GIB", 0)
    recomputed = run_task("linear_probe_digits", tmp_path / "recomputed", **settings)
    assert "computed once" not in capsys.readouterr().out
    ours, theirs = read_json(kept / "result.json"), read_json(recomputed / "result.json")
    assert ours["eval/loss"] == pytest.approx(theirs["eval/loss"], rel=1e-4)  # sums in another order
    a, b = leaves(kept), leaves(recomputed)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_probes_statistics_are_those_of_the_features_and_the_frozen_encoder_is_the_checkpoints(
    pretrained, tmp_path
):
    workdir = run_task("linear_probe_digits", tmp_path, init_from=str(pretrained), train__steps=80)
    before, after = leaves(pretrained), leaves(workdir)
    assert all(np.array_equal(before[name], after[name]) for name in after if name in before)
    # After 80 steps the first values of the running statistics (0 and 1) have a weight of .9^80 = 2e-4.
    model = mae_jax.load(pretrained)
    features = np.asarray(jax.jit(lambda x: model.encode(x)[:, 1:].mean(1))(training_digits()))
    mean, variance = (after[f"['head']['batch_norm']['{name}']"] for name in ("mean", "variance"))
    np.testing.assert_allclose(mean, features.mean(0), atol=0.1 * features.std())
    np.testing.assert_allclose(variance, features.var(0), rtol=0.5)


def training_digits():
    source, data = Digits("train"), digits.get_config().data
    return normalize(np.stack([source[i]["image"] for i in range(len(source))]), data)


# Two optimizers, an average, running statistics, pictures and kept features.
@pytest.mark.parametrize("name", ["finetune_digits", "linear_probe_digits"])
def test_a_run_that_is_lengthened_ends_as_one_that_never_stopped(pretrained, tmp_path, name):
    settings = dict(init_from=str(pretrained), optimizer__warmup_epochs=0.0, optimizer__min_learning_rate=1e-2)
    settings |= dict(optimizer__base_learning_rate=1e-2 * 256 / (64 if name == "finetune_digits" else 256))
    if name == "finetune_digits":
        settings |= dict(train__ema_decay=0.9)
    whole = run_task(name, tmp_path / "whole", train__steps=4, **settings)
    parts = run_task(name, tmp_path / "parts", train__steps=2, **settings)
    run_task(name, parts, train__steps=4, **settings)
    ours, theirs = read_checkpoint(parts, 4), read_checkpoint(whole, 4)
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)
    assert read_json(parts / "result.json") == read_json(whole / "result.json")


def test_another_resolution_resizes_the_positions_and_says_so(pretrained, tmp_path, capsys):
    settings = dict(init_from=str(pretrained), given=("model.image_size",), model__image_size=(12, 8))
    run_task("linear_probe_digits", tmp_path, **settings)
    assert "positions resized from 4 x 4 patches" in capsys.readouterr().out
    assert leaves(tmp_path)["['encoder']['positions']"].shape == (1 + 6 * 4, 16)


def test_the_encoders_sizes_are_the_checkpoints_and_this_is_told(pretrained, tmp_path, capsys):
    run_task("linear_probe_digits", tmp_path, init_from=str(pretrained), model__width=64, model__depth=3)
    assert "model.depth is 2, the checkpoint's, not 3" in capsys.readouterr().out
    model = read_json(tmp_path / "config.json")["model"]
    assert (model["width"], model["depth"]) == (16, 2)


def test_a_size_that_the_command_line_asks_for_beside_a_checkpoint_that_has_another_is_refused(pretrained, tmp_path):
    settings = dict(init_from=str(pretrained), given=("model.patch_size",), model__patch_size=4)
    message = mistake("finetune_digits", tmp_path, **settings)
    assert "model.patch_size=4 is 2 in the checkpoint and cannot be changed" in message


def test_the_head_of_a_classifier_is_kept_if_it_fits(finetuned, tmp_path, capsys):
    run_task("finetune_digits", tmp_path / "same", init_from=str(finetuned), train__ema_decay=0.5)
    assert "with its head" in capsys.readouterr().out


def test_a_classifier_may_have_more_classes_than_the_data_in_a_new_head_and_is_evaluated_on_them(
    finetuned, tmp_path, capsys
):
    settings = dict(init_from=str(finetuned), train__steps=1, classifier__num_classes=12)
    workdir = run_task("finetune_digits", tmp_path / "more", **settings)
    assert "a new head: the checkpoint's has 10 classes, the data have 12" in capsys.readouterr().out
    result = read_json(run_task("evaluate", tmp_path / "evaluated", init_from=str(workdir)) / "result.json")
    assert result["eval/top1"] == read_json(workdir / "result.json")["eval/top1"]


def test_a_run_that_is_started_again_before_its_first_checkpoint_begins_with_the_same_weights(
    pretrained, finetuned, tmp_path
):
    moving, workdir = shutil.copytree(finetuned, tmp_path / "moving"), tmp_path / "run"
    settings = dict(init_from=str(moving), train__steps=1, optimizer__base_learning_rate=0.0)
    run_task("linear_probe_digits", workdir, **settings)
    first = read_json(workdir / "result.json")
    for name in ("checkpoints", "result.json"):
        shutil.rmtree(workdir / name) if name == "checkpoints" else (workdir / name).unlink()
    shutil.copytree(find_checkpoint(pretrained), moving / "checkpoints" / "40")  # the other run goes on
    assert find_checkpoint(moving).name == "40"
    run_task("linear_probe_digits", workdir, **settings)
    assert read_json(workdir / "result.json") == first


def test_a_share_of_the_labels_is_taken_of_each_class(pretrained, tmp_path, capsys):
    settings = dict(data__label_fraction=0.1, data__batch_size=16, train__steps=1)
    run_task("linear_probe_digits", tmp_path, init_from=str(pretrained), **settings)
    assert "142 training images in digits train, 360 evaluation images in digits eval" in capsys.readouterr().out


@pytest.fixture
def pictures(tmp_path):
    """Makes a folder with four pictures for each of the given class folders; "" is the folder itself."""

    def make(*classes):
        rng = np.random.default_rng(0)
        for name in classes:
            (tmp_path / "pictures" / name).mkdir(parents=True, exist_ok=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (8, 8), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{number}.png")
        return str(tmp_path / "pictures")

    return make


def test_pictures_without_labels_are_refused(pretrained, pictures, tmp_path):
    settings = dict(data__name="image_folder", data__path=pictures(""), data__batch_size=2)
    message = mistake("finetune_digits", tmp_path / "run", init_from=str(pretrained), **settings)
    assert "no labels" in message and "folder of its own" in message
    message = mistake("knn", tmp_path / "knn", init_from=str(pretrained), **settings)
    assert "no labels" in message


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(data__augmentation="rand_augmnt"), 'did you mean "rand_augment"'),
        (dict(classifier__trained_blocks=3.0), "trained_blocks=3.0"),
        (dict(classifier__num_classes=5), "classifier.num_classes=5"),
        (dict(classifier__pool="max"), "classifier.pool='max'"),
        (dict(data__batch_size=7), "must be a multiple of 2 (1 devices x train.accumulate_steps=1 x pairs to mix)"),
        (dict(data__label_fraction=0.0), "label_fraction=0.0"),
        (dict(optimizer__name="lars"), "optimizer.name=lars"),
        (dict(optimizer__name="muon", classifier__trained_blocks=0.0), "trained_blocks=0 trains none"),
        (dict(data__label_fraction=0.01), "larger than the training data"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(pretrained, tmp_path, settings, expected):
    assert expected in mistake("finetune_digits", tmp_path / "run", init_from=str(pretrained), **settings)


def test_pre_training_cannot_go_on_from_a_classifier(finetuned, tmp_path):
    assert "without a decoder" in mistake("digits", tmp_path / "run", init_from=str(finetuned))


@pytest.mark.parametrize("name", ["finetune", "linear_probe", "attentive_probe"])
def test_the_general_configs_take_data_size_and_batch_from_the_checkpoint(pretrained, tmp_path, name, capsys):
    settings = dict(init_from=str(pretrained), train__steps=2)
    for key in ("width", "depth", "num_heads", "decoder_width", "decoder_depth", "decoder_num_heads"):
        settings[f"model__{key}"] = getattr(common.get_config().model, key)  # not those of the tests
    run_task(name, tmp_path, **settings)
    found, out = read_json(tmp_path / "config.json"), capsys.readouterr().out
    assert found["data"]["name"] == "digits" and "digits: 1,437 training images" in out
    assert (found["model"]["image_size"], found["model"]["width"], found["model"]["dtype"]) == (8, 16, "float32")
    assert found["data"]["batch_size"] == 64 and found["data"]["mean"] == [0.305] and not found["data"]["flip"]
    assert ("computed once" in out) == (name != "finetune")
    if name == "linear_probe":
        run_task(name, tmp_path, **settings | dict(train__steps=3))  # goes on
        assert "going on from checkpoint 2" in capsys.readouterr().out


def test_a_random_encoder_of_the_checkpoints_size_begins_from_scratch(pretrained, tmp_path, capsys):
    settings = dict(init_from=str(pretrained), classifier__random_encoder=True, train__steps=1)
    workdir = run_task("linear_probe_digits", tmp_path, **settings)
    assert "random weights, of the size of those in" in capsys.readouterr().out
    before, after = leaves(pretrained), leaves(workdir)
    name = "['encoder']['blocks']['mlp']['fc1']['kernel']"
    assert before[name].shape == after[name].shape and not np.array_equal(before[name], after[name])
