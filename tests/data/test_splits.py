"""Which folders are for training and for evaluation, as people name them; which pictures are held out."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_jax.data.splits import find_name, held_out
from mae_jax.runtime.errors import UserError
from tests.data.conftest import names


@pytest.fixture
def parts(tmp_path, write_pictures, open_folder):
    """Returns a function: folders of two pictures each -> (training, evaluation) folders below them, by settings."""

    def part(*folders, **settings):
        write_pictures(tmp_path, *(f"{folder}/{i}.png" for folder in folders for i in range(2)))
        sources = [open_folder(tmp_path, split, **settings) for split in ("train", "eval")]
        return [sorted({name.rsplit("/", 1)[0] for name in names(source, tmp_path)}) for source in sources]

    return part


def classes(*splits):
    return [f"{split}/{name}" for split in splits for name in ("cat", "dog")]


@pytest.mark.parametrize(
    "train, evaluation",
    [("Train", "Val"), ("TRAIN", "TEST"), ("training", "testing"), ("train", "valid"), ("Training", "Validation"),
     ("train", "eval")],
)  # fmt: skip
def test_known_names_are_splits_whatever_their_case_and_spelling(parts, train, evaluation):
    assert parts(*classes(train, evaluation)) == [classes(train), classes(evaluation)]


def test_where_validation_and_test_exist_training_watches_validation_and_test_is_there_on_request(parts):
    folders = classes("train", "valid", "test")
    assert parts(*folders) == [classes("train"), classes("valid")]
    assert parts(*folders, eval_split="test") == [classes("train"), classes("test")]
    assert parts(*folders, eval_split="TESTING") == [classes("train"), classes("test")]


def test_a_setting_names_a_folder_exactly_or_in_another_case_or_further_below(parts):
    assert parts(*classes("A", "b"), train_split="a", eval_split="b") == [classes("A"), classes("b")]
    assert parts(*classes("A/x", "b"), train_split="A/x", eval_split="b") == [classes("A/x"), classes("b")]


def test_a_split_that_is_asked_for_and_not_there_is_an_error_that_lists_what_is_there(parts):
    with pytest.raises(UserError, match="data.eval_split=test: .* has no such sub-folder; there are train, val$"):
        parts(*classes("train", "val"), eval_split="test")
    with pytest.raises(UserError, match="data.train_split=mine: .* has no such sub-folder; there are train, val$"):
        parts(*classes("train", "val"), train_split="mine")


def test_a_split_that_a_setting_names_is_not_missed_where_nothing_is_split(parts):
    assert parts("cat", "dog", eval_split="test") == [["cat", "dog"], ["cat", "dog"]]


@pytest.mark.parametrize(
    "folders, remedies",
    [
        (("Train", "training", "val"), ["data.train_split=Train", "data.train_split=training"]),
        (("train", "val", "valid"), ["data.eval_split=val", "data.eval_split=valid"]),
        (("train", "val", "validation"), ["data.eval_split=val", "data.eval_split=./validation"]),
    ],
)
def test_two_folders_for_one_split_are_an_error_that_asks_which_and_its_remedies_help(parts, folders, remedies):
    with pytest.raises(UserError, match=f"which is meant. Set {' or '.join(remedies)}"):
        parts(*folders)
    for remedy in remedies:
        setting, name = remedy.removeprefix("data.").split("=")
        assert [name.removeprefix("./")] in parts(*folders, **{setting: name})


@pytest.mark.parametrize("other", ["two", "val"])
def test_sub_folders_that_hold_the_same_class_folders_are_never_classes(parts, other):
    with pytest.raises(UserError, match=f"one and {other} hold the same class folders .cat, dog., .* set data.train"):
        parts(*classes("one", other))
    assert parts(*classes("one", other), train_split="one", eval_split=other) == [classes("one"), classes(other)]
    assert parts(*classes("one", other), train_split="", eval_split="")[0] == classes(
        "one", other
    )  # unless one says so


def test_folders_with_the_word_of_a_split_in_their_names_are_not_taken_for_classes(parts):
    remedy = "data.train_split=train2017 and data.eval_split=val2017, or data.train_split='' if they are classes"
    with pytest.raises(UserError, match=f"train2017 and val2017 are named like splits: .* {remedy}"):
        parts("train2017", "val2017")
    assert parts("train2017", "val2017", train_split="train2017", eval_split="val2017") == [["train2017"], ["val2017"]]
    assert parts("train2017", "val2017", train_split="")[0] == ["train2017", "val2017"]


def test_a_path_above_the_splits_is_an_error_that_names_the_right_one(parts, tmp_path):
    with pytest.raises(UserError, match=f"train and val are named like splits: set data.path={tmp_path}/images,"):
        parts(*classes("images/train", "images/val"))


def test_a_class_named_like_a_split_is_asked_about_and_either_answer_helps(parts):
    with pytest.raises(UserError, match="in test and in cat: is test a class or a split.*data.eval_split=test"):
        parts("cat", "test")
    assert parts("cat", "test", eval_split="") == [["cat", "test"], ["cat", "test"]]
    assert parts("cat", "test", eval_split="test") == [["cat"], ["test"]]


def test_a_training_folder_beside_other_pictures_is_asked_about_and_each_answer_helps(parts):
    with pytest.raises(UserError, match="in train and in masks: is train a class or a split.*data.train_split=''"):
        parts("train", "masks")
    assert parts("train", "masks", train_split="") == [["masks", "train"], ["masks", "train"]]
    assert parts("train", "masks", eval_split="masks") == [["train"], ["masks"]]
    assert parts("train", "masks", eval_split="") == [["train"], ["train"]]


def test_no_split_beside_the_training_pictures_is_trained_on(parts):
    assert parts("cat", "dog", *classes("val", "test")) == [["cat", "dog"], classes("val")]


def test_an_evaluation_folder_alone_can_be_measured(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "test/cat/1.png", "test/dog/2.png")
    evaluation = open_folder(tmp_path, "eval")
    assert evaluation.class_names == ["cat", "dog"] and len(evaluation) == 2
    with pytest.raises(UserError, match="no training pictures"):
        open_folder(tmp_path, "train")


@pytest.mark.parametrize("train, evaluation", [
    ("train", "train"), ("train", "train/cat"), ("val/cat", "val"), ("", "cat/deep"), ("", "."), ("train", "link"),
])  # fmt: skip
def test_no_picture_is_for_training_and_for_evaluation(parts, tmp_path, train, evaluation):
    (tmp_path / "link").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="is for training and .* for evaluation, but they share pictures"):
        parts(*classes("train", "val"), "cat/deep", train_split=train, eval_split=evaluation)


@pytest.mark.parametrize("there, train, evaluation", [
    (["TRAIN", "VALIDATION", "TEST"], "TRAIN", "VALIDATION"), (["Training", "Test"], "Training", "Test"),
    (["train", "Train", "val", "validation"], "train", "validation"), (["a", "b"], None, None),
])  # fmt: skip
def test_the_usual_names_are_found_among_the_values_of_a_column_too(there, train, evaluation):
    assert find_name(there, "data.train_split", "train", "t.csv", "split") == train
    assert find_name(there, "data.eval_split", "validation", "t.csv", "split") == evaluation


def test_a_value_that_is_asked_for_and_not_there_is_an_error_that_lists_those_that_are():
    with pytest.raises(UserError, match="data.eval_split=fold9: t.csv has no such split; there are fold1, fold2$"):
        find_name(["fold1", "fold2"], "data.eval_split", "fold9", "t.csv", "split")
    with pytest.raises(UserError, match="t.csv holds val and valid: which is meant. Set data.eval_split=val or data."):
        find_name(["val", "valid"], "data.eval_split", "validation", "t.csv", "split")


SIZES = st.lists(st.integers(1, 20), min_size=2, max_size=15)
FRACTION = st.floats(0.01, 0.99)


def grouped(sizes) -> tuple[list[str], list[str]]:
    """Names of pictures, and the group of each."""
    groups = [f"patient {number}" for number, size in enumerate(sizes) for _ in range(size)]
    return [f"{place}.png" for place in range(len(groups))], groups


@given(SIZES, FRACTION)
def test_a_group_is_held_out_whole_or_not_at_all_and_some_are_on_each_side(sizes, fraction):
    names, groups = grouped(sizes)
    if len(names) > 2:
        held = held_out(names, fraction, "t.csv", None, groups)
        sides = {(group, bool(side)) for group, side in zip(groups, held, strict=True)}
        assert len(sides) == len(sizes) and {side for _, side in sides} == {True, False}


@given(SIZES, FRACTION)
def test_held_out_groups_hold_the_fraction_of_all_pictures_to_within_the_largest_group(sizes, fraction):
    names, groups = grouped(sizes)
    assert abs(held_out(names, fraction, "t.csv", None, groups).sum() - fraction * len(names)) <= max(sizes)


@given(SIZES, FRACTION, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter_to_what_is_held_out(sizes, fraction, random):
    names, groups = grouped(sizes)
    order = list(range(len(names)))
    random.shuffle(order)
    for by in ({"groups": groups}, {"classes": groups}):
        ((key, values),) = by.items()
        held = held_out(names, fraction, "t.csv", **by)
        again = held_out([names[i] for i in order], fraction, "t.csv", **{key: [values[i] for i in order]})
        np.testing.assert_array_equal(again, held[order])


def test_one_large_group_is_not_held_out_for_the_first_hash_alone():
    for number in range(20):
        groups = [f"large {number}"] * 90 + [f"small {number}"] * 10
        assert held_out([*map(str, range(100))], 0.1, "t.csv", None, groups).tolist() == [False] * 90 + [True] * 10


def test_a_single_group_cannot_be_on_both_sides():
    with pytest.raises(UserError, match="t.csv: all pictures are of one group, p1, which cannot be on both sides"):
        held_out(["a", "b"], 0.5, "t.csv", None, ["p1", "p1"])


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=60), FRACTION)
def test_of_each_class_the_rounded_fraction_is_held_out_but_never_all_and_of_two_at_least_one(classes, fraction):
    held = held_out([str(place) for place in range(len(classes))], fraction, "t.csv", classes)
    if len(set(classes)) == len(classes):  # pictures that are each a class of their own count as one class
        classes = "a" * len(classes)
    for name, count in collections.Counter(classes).items():
        found = sum(side for one, side in zip(classes, held, strict=True) if one == name)
        assert found == min(count - 1, max(1, round(fraction * count)))
