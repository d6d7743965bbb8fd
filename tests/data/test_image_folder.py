"""Image folders: what is a class, what is evaluated on, and what a mistaken path says."""

import os
import pickle
import re

import numpy as np
import pytest

from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.sources import describe_sources, make_source, make_sources
from mae_jax.runtime.errors import UserError
from tests.data.conftest import names


def labels(source) -> list[int]:
    return [source[i]["label"] for i in range(len(source))]


def test_class_folders_give_labels_in_the_order_of_their_names(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "train/dog/1.png", "train/cat/deep/er/2.png", "train/cat/1.png", "train/ant/1.png",
                   "validation/dog/9.png", "validation/ant/9.png")  # fmt: skip
    train, evaluation = open_folder(tmp_path, "train"), open_folder(tmp_path, "eval")
    assert train.class_names == evaluation.class_names == ["ant", "cat", "dog"]
    assert train.num_classes == evaluation.num_classes == 3
    assert names(train, tmp_path / "train") == ["ant/1.png", "cat/1.png", "cat/deep/er/2.png", "dog/1.png"]
    assert labels(train) == [0, 1, 1, 2]
    assert labels(evaluation) == [0, 2]  # of train's names, though there is no "cat" here
    assert train[3]["image"] == (tmp_path / "train/dog/1.png").read_bytes()
    assert train.labels().tolist() == [0, 1, 1, 2] and train.labels().dtype == np.int64


def test_a_flat_folder_is_unlabelled(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, *(f"{i}.png" for i in range(10)))
    train = open_folder(tmp_path, "train")
    assert (train.num_classes, train.class_names, labels(train)) == (0, None, [-1] * 9)
    assert train.labels().tolist() == [-1] * 9


def test_every_extension_counts_in_any_case_and_hidden_files_do_not(tmp_path, write_pictures, open_folder):
    good = ["a.JPG", "b.jpeg", "c.PNG", "d.webp", "e.bmp", "f.tif", "g.Tiff", "h.gif", "i.JPEG", "j.jfif", "k.jpe",
            "l.apng", "m.avif", "n.ppm"]  # fmt: skip
    write_pictures(tmp_path, *(f"train/{name}" for name in good), "val/x.png",
                   "train/.hidden.png", "train/.cache/y.png", "train/notes.txt", "train/z.png.part")  # fmt: skip
    assert names(open_folder(tmp_path, "train"), tmp_path / "train") == good


@pytest.mark.parametrize("folder", ["val", "validation", "test", "my_own"])
def test_the_evaluation_folder_is_found_under_its_usual_names(tmp_path, write_pictures, open_folder, folder):
    write_pictures(tmp_path, "train/1.png", f"{folder}/2.png")
    setting = {"eval_split": "my_own"} if folder == "my_own" else {}
    assert names(open_folder(tmp_path, "eval", **setting), tmp_path) == [f"{folder}/2.png"]


def test_the_folder_that_the_setting_names_comes_before_the_usual_ones(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "train/1.png", "val/2.png", "test/3.png")
    assert names(open_folder(tmp_path, "eval", eval_split="test"), tmp_path) == ["test/3.png"]


def test_an_evaluation_folder_beside_the_training_pictures_is_not_trained_on(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "cat/1.png", "dog/2.png", "val/cat/3.png")
    assert names(open_folder(tmp_path, "train"), tmp_path) == ["cat/1.png", "dog/2.png"]
    assert names(open_folder(tmp_path, "eval"), tmp_path) == ["val/cat/3.png"]


@pytest.mark.parametrize("count, fraction, held_out", [(40, 0.1, 4), (3, 0.1, 1), (2, 0.9, 1), (40, 0.5, 20)])
def test_without_an_evaluation_folder_a_share_is_held_out(
    tmp_path, write_pictures, open_folder, count, fraction, held_out
):
    all_names = [f"{i}.png" for i in range(count)]
    write_pictures(tmp_path, *all_names)
    parts = [names(open_folder(tmp_path, split, eval_fraction=fraction), tmp_path) for split in ("train", "eval")]
    assert len(parts[1]) == held_out
    assert sorted(parts[0] + parts[1]) == sorted(all_names)


def test_what_is_held_out_depends_neither_on_the_seed_nor_on_where_the_folder_lies(
    tmp_path, write_pictures, open_folder
):
    for place in ("here", "there/below"):
        write_pictures(tmp_path / place, *(f"{i}.png" for i in range(30)))
    here = names(open_folder(tmp_path / "here", "eval", seed=1), tmp_path / "here")
    there = names(open_folder(tmp_path / "there/below", "eval", seed=2), tmp_path / "there/below")
    assert here == there


def test_what_is_held_out_is_a_random_choice(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, *(f"{i:03}.png" for i in range(200)))
    held_out = [int(name[:3]) for name in names(open_folder(tmp_path, "eval", eval_fraction=0.25), tmp_path)]
    # The mean of 50 of 0..199 without replacement: 99.5 with a standard deviation of 7.1.
    assert abs(sum(held_out) / 50 - 99.5) < 4 * 7.1
    assert len({b - a for a, b in zip(held_out, held_out[1:], strict=False)}) > 3  # nor evenly spaced


def test_every_class_of_two_or_more_pictures_is_held_out_alike_and_has_both_sides(
    tmp_path, write_pictures, open_folder
):
    sizes = {"ant": 2, "bee": 20, "cat": 1, "dog": 40}
    write_pictures(tmp_path, *(f"{name}/{i}.png" for name, size in sizes.items() for i in range(size)))
    train, evaluation = (open_folder(tmp_path, split, eval_fraction=0.1) for split in ("train", "eval"))
    assert np.bincount(evaluation.labels(), minlength=4).tolist() == [1, 2, 0, 4]
    assert np.bincount(train.labels(), minlength=4).tolist() == [1, 18, 1, 36]
    assert "no pictures to evaluate on for 1 of 4 classes: cat" in evaluation.notes


def test_classes_of_one_picture_each_are_held_out_of_together(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, *(f"{name:02}/1.png" for name in range(40)))
    train, evaluation = (open_folder(tmp_path, split, eval_fraction=0.1) for split in ("train", "eval"))
    assert (len(train), len(evaluation), train.num_classes) == (36, 4, 40)
    assert [note.split(":")[0] for note in evaluation.notes] == [
        "no pictures to learn from for 4 of 40 classes", "no pictures to evaluate on for 36 of 40 classes",
    ]  # fmt: skip


def test_what_is_held_out_of_a_class_stays_when_another_class_is_added(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(30)))
    before = names(open_folder(tmp_path, "eval"), tmp_path)
    write_pictures(tmp_path, *(f"bee/{i}.png" for i in range(50)))
    assert [name for name in names(open_folder(tmp_path, "eval"), tmp_path) if "bee" not in name] == before


def test_an_evaluation_fraction_of_one_takes_all_and_leaves_nothing_to_train_on(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)))
    evaluation = open_folder(tmp_path, "eval", eval_fraction=1.0)
    assert len(evaluation) == 8 and evaluation.place == f"in {tmp_path} (all of it)"
    with pytest.raises(NothingToTrainOn, match="data.eval_fraction=1.0 leaves none of the pictures"):
        open_folder(tmp_path, "train", eval_fraction=1.0)


def test_classes_that_a_split_folder_lacks_are_named(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/dog/3.png")
    assert open_folder(tmp_path, "eval").notes == ["no pictures to evaluate on for 1 of 2 classes: cat"]


def test_both_folders_their_counts_and_what_is_not_used_are_told(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, *(f"Train/{i}.png" for i in range(3)), "Val/3.png", "Test/4.png", "Train/5.heic_")
    sources = [open_folder(tmp_path, split) for split in ("train", "eval")]
    assert describe_sources("image_folder", *sources) == [
        f"image_folder: 3 training images in {tmp_path}/Train, 1 evaluation image in {tmp_path}/Val",
        "1 files of types that are not read: .heic_ 1",
        "folders that are not used: Test",
    ]


def test_folders_may_be_links_and_a_link_upwards_is_not_followed_for_ever(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "elsewhere/1.png", "data/train/dog/2.png", "data/val/dog/3.png")
    (tmp_path / "data/train/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/train/dog/up").symlink_to(tmp_path / "data/train")
    train = open_folder(tmp_path / "data", "train")
    assert train.class_names == ["cat", "dog"]
    assert names(train, tmp_path / "data/train") == ["cat/1.png", "dog/2.png"]


def test_two_classes_may_be_links_to_one_folder(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "elsewhere/1.png", "data/val/dog/3.png")
    (tmp_path / "data/train").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "data/train" / name).symlink_to(tmp_path / "elsewhere")
    assert labels(open_folder(tmp_path / "data", "train")) == [0, 1]


def test_a_source_can_be_pickled(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/dog/3.png")
    train = open_folder(tmp_path, "train")
    assert pickle.loads(pickle.dumps(train))[1] == train[1]


def test_mistaken_paths_are_named_with_a_remedy(tmp_path, write_pictures, open_folder, make_config):
    with pytest.raises(UserError, match="data.path is not set"):
        make_source(make_config(name="image_folder"), "train", (8, 8), 3)
    with pytest.raises(UserError, match=f"{tmp_path}/none cannot be read: No such file.*set data.path"):
        open_folder(tmp_path / "none", "train")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(UserError, match=f"no pictures found in {tmp_path}: expected files ending in .* .jpg"):
        open_folder(tmp_path, "train")
    write_pictures(tmp_path, "alone.png")
    with pytest.raises(UserError, match="at least 2 are needed"):
        open_folder(tmp_path, "train")


def test_a_path_that_is_no_folder_says_what_it_is(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "data/1.png")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name, expected in (
        ("data/1.png", "is a file, not a folder"),
        ("data/1.png/x", "Not a directory"),
        ("da*/", "set data.path to the folder.*patterns are not expanded"),
        ("gone", f"a link to {tmp_path}/nowhere, cannot be read: No such file"),
    ):
        with pytest.raises(UserError, match=f"^data.path={re.escape(str(tmp_path / name))}.*{expected}"):
            open_folder(tmp_path / name, "train")


def test_an_evaluation_class_that_training_lacks_is_an_error_only_beside_training(
    tmp_path, write_pictures, make_config, open_folder
):
    write_pictures(tmp_path, "train/cat/1.png", "val/cat/2.png", "val/elk/3.png")
    evaluation = open_folder(tmp_path, "eval")
    assert (evaluation.class_names, labels(evaluation)) == (["cat", "elk"], [0, 1])
    with pytest.raises(UserError, match="val have the class 'elk', which the training data in .*train does not have"):
        make_sources(make_config(name="image_folder", path=str(tmp_path)), (8, 8), 3)


def test_both_splits_are_those_opened_one_by_one_from_one_listing(
    tmp_path, write_pictures, make_config, open_folder, monkeypatch
):
    write_pictures(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/dog/3.png")
    alone = [open_folder(tmp_path, split) for split in ("train", "eval")]
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    both = make_sources(make_config(name="image_folder", path=str(tmp_path)), (8, 8), 3)
    assert len(listed) == len(set(listed)) == 6
    for source, other in zip(both, alone, strict=True):
        assert names(source, tmp_path) == names(other, tmp_path) and labels(source) == labels(other)
        assert (source.class_names, source.notes, source.place) == (other.class_names, other.notes, other.place)


def test_pictures_beside_class_folders_are_an_error(tmp_path, write_pictures, open_folder):
    write_pictures(tmp_path, "cat/1.png", "stray.png")
    with pytest.raises(UserError, match=r"both pictures \(stray.png\) and folders of pictures \(cat\)"):
        open_folder(tmp_path, "train")


def test_a_folder_named_like_the_split_among_class_folders_is_an_error_with_a_way_out(
    tmp_path, write_pictures, open_folder
):
    write_pictures(tmp_path, *(f"{name}/{i}.png" for name in ("bus", "car", "train") for i in range(2)))
    with pytest.raises(UserError, match="pictures in train and in bus: is train a class"):
        open_folder(tmp_path, "train")
    assert open_folder(tmp_path, "train", train_split="").class_names == ["bus", "car", "train"]
