"""Which pictures of a folder are measured, and that none is evaluated on that was trained on."""

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import common, image_folder
from mae_jax.data.sources import make_source
from mae_jax.evaluation.unseen import (
    TRAINED_ON,
    choose_pictures,
    find_training_pictures,
    keep_hold_out,
    take_pictures,
)
from mae_jax.interop.workdirs import Weights
from mae_jax.runtime.errors import UserError
from mae_jax.tasks.evaluate import match_to_classifier


@pytest.fixture
def folder(tmp_path):
    """Returns a function: the name of a folder and its class folders, of ten pictures each -> its path."""

    def make(name, *classes):
        for label in classes:
            (tmp_path / name / label).mkdir(parents=True)
            for number in range(10):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / label / f"{number}.png")
        return str(tmp_path / name)

    return make


def data_of(path, **settings):
    return common.get_config().data.to_dict() | {"name": "image_folder", "path": path} | settings


def measured(data, trained, *given):
    """(pictures, their folder, note) of what is measured."""
    chosen, note = choose_pictures(data, trained, {"path", *given})
    source = make_source(ConfigDict(data | chosen), "eval", (8, 8), 3)
    return len(source), str(source._folder), note


def test_a_folder_without_splits_that_is_named_for_measuring_is_counted_whole(folder):
    own, other = folder("own", "cat", "dog"), folder("other", "cat", "dog", "elk")
    trained = {"data": data_of(own), "num_train_examples": 18}
    assert measured(data_of(other), trained) == (30, other, "")
    assert measured(data_of(other), {"data": {"name": None}}) == (30, other, "")  # a file of others
    assert measured(data_of(other, eval_fraction=0.2), trained, "eval_fraction") == (6, other, "")


def test_the_evaluation_folder_of_a_named_folder_is_measured_if_it_has_one(folder):
    own, other = folder("own", "cat", "dog"), folder("other", "TRAIN/cat", "TRAIN/dog", "Val/cat", "Val/dog")
    assert measured(data_of(other), {"data": data_of(own)}) == (20, f"{other}/Val", "")


def test_of_the_folder_that_it_was_trained_on_only_what_was_held_out_is_counted_and_told(folder, tmp_path):
    own = folder("own", "cat", "dog")
    (tmp_path / "link").symlink_to(own)
    trained = {"data": data_of(own, eval_fraction=0.3), "num_train_examples": 14}
    for path in (own, str(tmp_path / "link")):
        count, _, note = measured(data_of(path), trained)
        assert count == 6 and "only held-out pictures are counted" in note
    assert measured(data_of(own, eval_fraction=1.0), trained, "eval_fraction") == (20, own, TRAINED_ON)


def test_what_is_held_out_of_a_folder_that_was_trained_on_whole_counts_as_trained_on(folder):
    own = folder("own", "train/cat", "train/dog", "val/cat")
    found = measured(data_of(own, eval_split=""), {"data": data_of(own)}, "eval_split")
    assert found == (2, f"{own}/train", TRAINED_ON)


def test_a_folder_that_was_moved_after_training_is_still_the_one_it_was_trained_on(folder):
    moved, trained = folder("moved", "cat", "dog"), {"data": data_of("/no/longer/here"), "num_train_examples": 18}
    count, _, note = measured(data_of(moved), trained)
    assert count == 2 and "holds as many pictures" in note
    trained["num_train_examples"] = 17
    count, _, note = measured(data_of(moved), trained)
    assert count == 20 and note.startswith("the folder it was trained on, /no/longer/here, is not here")
    trained["data"] |= {"label_fraction": 0.5}
    assert measured(data_of(moved), trained | {"num_train_examples": 8})[0] == 2


@pytest.mark.parametrize("below", ["", "/train", "/train/cat"])
def test_pictures_that_it_was_trained_on_are_not_counted_without_a_word(folder, tmp_path, below):
    own = folder("all/own", "train/cat", "train/dog", "val/cat")
    note = measured(data_of(own + below if below else str(tmp_path / "all"), train_split=""), {"data": data_of(own)})[2]
    assert note == TRAINED_ON
    assert measured(data_of(f"{own}/val"), {"data": data_of(own)})[2] == ""


def test_names_of_the_checkpoints_own_splits_are_not_looked_for_elsewhere(folder):
    own, other = folder("own", "one/cat", "two/cat"), folder("other", "cat", "dog")
    names = dict(train_split="one", eval_split="two")
    assert measured(data_of(other, **names), {"data": data_of(own, **names)})[:2] == (20, other)
    moved = folder("moved", "one/cat", "two/cat")
    assert measured(data_of(moved, **names), {"data": data_of(own, **names)})[:2] == (10, f"{moved}/two")


def run_of(data, version="new"):
    """The config of a run with these settings `data.*`; an old version knew no `data.stratify`."""
    return {"data": {key: value for key, value in data.items() if version == "new" or key != "stratify"}}


def config_of(path, **settings):
    config = image_folder.get_config()
    config.update_from_flattened_dict({"data.path": path} | settings)
    return config


def hold_out(config, trained, *, resumed=True):
    keep_hold_out(config, "runs/x", trained, resumed=resumed)


@pytest.mark.parametrize("version, stratify", [("old", False), ("new", True)])
def test_a_run_that_an_earlier_version_began_holds_out_what_it_did(folder, version, stratify):
    own = folder("own", "cat", "dog")
    trained = run_of(data_of(own), version)
    for resumed in (True, False):  # goes on, or begins with its weights, on the same pictures
        config = config_of(own)
        hold_out(config, trained, resumed=resumed)
        assert config.data.stratify == stratify
    config = config_of(folder("other", "cat", "dog"))
    hold_out(config, trained, resumed=False)
    assert config.data.stratify
    hold_out(config, None)


def test_a_run_that_took_split_folders_for_classes_does_not_go_on_with_an_evaluation_on_them(folder):
    own = folder("own", "Train/cat", "Train/dog", "Val/cat", "Val/dog")
    as_classes = {"train_split": "", "eval_split": ""}
    trained = run_of(data_of(own, **as_classes))
    with pytest.raises(UserError, match=f"has learned from pictures that are now for evaluation .in {own}/Val; data."):
        hold_out(config_of(own), trained)
    hold_out(config_of(own, **{"data.train_split": "", "data.eval_split": ""}), trained)  # as it was
    hold_out(config_of(own), run_of(data_of(own)))


@pytest.mark.parametrize("settings, changed", [
    ({"data.eval_fraction": 0.2}, "data.eval_fraction=0.2 was 0.1"),
    ({"data.stratify": False}, "data.stratify=False was True"),
    ({"data.eval_split": ""}, "data.eval_split='' was 'validation'"),
])  # fmt: skip
def test_a_run_does_not_go_on_with_other_pictures_held_out_than_before(folder, settings, changed):
    own = folder("own", *(("train/cat", "val/cat") if "data.eval_split" in settings else ("cat", "dog")))
    trained = run_of(data_of(own))
    with pytest.raises(UserError, match=f"has learned from pictures that are now .*held out of {own}.*{changed}"):
        hold_out(config_of(own, **settings), trained)
    hold_out(config_of(own, **{"data.eval_fraction": 0.05}), trained)


def classifier(names, num_classes=3, name="image_folder"):
    weights = Weights({"data": {"name": name}, "class_names": names}, {}, 0, "")
    config = common.get_config()
    config.init_from, config.classifier.num_classes = "runs/x", num_classes
    return weights, config


def test_classes_are_matched_to_the_classifiers_by_name(folder):
    source = make_source(ConfigDict(data_of(folder("own", "cat", "elk"), eval_fraction=1.0)), "eval", (8, 8), 3)
    matched, names = match_to_classifier(source, *classifier(["elk", "ant", "cat"]))
    assert names == ["elk", "ant", "cat"] == matched.class_names and matched.num_classes == 3
    expected = [2] * 10 + [0] * 10
    assert matched.labels().tolist() == [matched[i]["label"] for i in range(20)] == expected
    with pytest.raises(UserError, match="the class 'elk', which runs/x does not have: it has 'ant', 'cat'"):
        match_to_classifier(source, *classifier(["ant", "cat"], 2))


def test_classes_of_a_file_of_others_in_other_words_are_taken_in_order_if_there_are_as_many(folder, capsys):
    source = make_source(ConfigDict(data_of(folder("own", "n01", "n02"), eval_fraction=1.0)), "eval", (8, 8), 3)
    matched, names = match_to_classifier(source, *classifier(["ant", "bee"], 2, name=None))
    assert matched is source and names == ["n01", "n02"] and "matched by their order" in capsys.readouterr().out
    with pytest.raises(UserError, match="has 3 classes, but data.name=.* has 2"):
        match_to_classifier(source, *classifier(["ant", "bee", "cat"], 3, name=None))


def test_class_names_that_are_not_utf_8_are_escaped_where_they_are_written(folder):
    source = make_source(ConfigDict(data_of(folder("own", "cat", "d\udcf6g"), eval_fraction=1.0)), "eval", (8, 8), 3)
    assert match_to_classifier(source, *classifier(["cat", "d\udcf6g"], 2))[1] == ["cat", "d\\xf6g"]


def test_pictures_to_learn_from_are_the_checkpoints_own_if_they_have_the_same_classes(folder):
    own, other = folder("own", "ant", "cat", "dog"), folder("other", "cat", "dog")
    weights, config = classifier(None)[0], common.get_config()
    weights.config["data"] = data_of(own)
    config.data = ConfigDict(data_of(other, eval_fraction=1.0))
    train, evaluation = find_training_pictures(weights, config, make_source(config.data, "eval", (8, 8), 3))
    assert np.bincount(train.labels()).tolist() == [9, 9, 9]
    assert evaluation.labels().tolist() == [1] * 10 + [2] * 10
    for data in ({"name": None}, data_of(folder("third", "elk", "fox")), {"name": "digits"}):
        weights.config["data"] = data
        with pytest.raises(UserError, match="none to learn from, and .*; set data.eval_fraction=0.1 to hold out"):
            find_training_pictures(weights, config, make_source(config.data, "eval", (8, 8), 3))


def taken(own, given=(), **settings):
    """The settings `data` of a run with settings of a config that names no data, after those of a checkpoint."""
    config = common.get_config()
    config.data.update({"name": None, "crop_scale": (0.4, 1.0), **settings})
    config.given, config.init_from = tuple(f"data.{name}" for name in given), "runs/mine"
    take_pictures(config, {"data": common.get_config().data.to_dict() | own})
    return config.data


def test_a_run_that_names_no_data_takes_those_of_the_checkpoint_and_prepares_them_its_own_way():
    own = dict(name="image_folder", path="mine", eval_split="test", eval_fraction=0.3, eval_crop=1.0, flip=False)
    data = taken(own | dict(batch_size=7, crop_scale=(1.0, 1.0)))
    assert {name: data[name] for name in own} == own
    assert data.batch_size == 4096 and data.crop_scale == (0.4, 1.0)
    assert taken(own | {"flip": True}, flip=False).flip is False  # which a probe of constant pictures needs


def test_another_folder_has_splits_of_its_own_and_what_is_given_stands():
    own = dict(name="image_folder", path="mine", train_split="", eval_fraction=0.3)
    data = taken(own, ["path"], path="other")
    assert (data.name, data.path, data.train_split, data.eval_fraction) == ("image_folder", "other", "train", 0.1)
    assert taken(own, ["path"], path="./mine").train_split == ""
    assert taken(own, ["eval_fraction"], eval_fraction=0.5).eval_fraction == 0.5


def test_pictures_that_nothing_names_and_a_path_for_data_that_have_none_are_refused():
    with pytest.raises(UserError, match="init_from=runs/mine does not say which pictures: name them, .*image_folder"):
        taken({"name": None})
    with pytest.raises(UserError, match="data.path=other: the checkpoint's data .digits. have no path; name the data"):
        taken({"name": "digits"}, ["path"], path="other")
