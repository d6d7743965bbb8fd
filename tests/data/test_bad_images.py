"""Pictures that cannot be used: replaced, named and counted, or an error; the same with threads and processes."""

import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.loader import make_eval_batches, make_train_batches
from mae_jax.data.sources import make_source
from mae_jax.runtime.errors import UserError
from tests.data.conftest import picture_bytes

SIZE = (8, 8)


@pytest.fixture
def folder(tmp_path, make_config):
    """Returns a function: (count of pictures, indices of bad ones) -> (config, source) of a folder with these."""

    def make(count, bad, content=b"", **settings):
        (tmp_path / "train").mkdir()
        (tmp_path / "val").mkdir()
        good = picture_bytes(0)
        for i in range(count):
            (tmp_path / f"train/{i:05}.png").write_bytes(content if i in bad else good)
        (tmp_path / "val/0.png").write_bytes(good)
        settings = {"name": "image_folder", "path": str(tmp_path), "batch_size": 20, **settings}
        config = make_config(**settings)
        return config, make_source(config, "train", SIZE, 3)

    return make


def read(config, source, count) -> tuple[list[dict], dict]:
    iterator = make_train_batches(source, config, SIZE, 3)
    try:
        return list(itertools.islice(iterator, count)), iterator.bad_images
    finally:
        iterator.close()


GOOD = picture_bytes(0)


@pytest.mark.parametrize("content, reason", [
    (b"", "the file is empty"),
    (GOOD[: len(GOOD) // 2], "damaged"),
    (b"<html>not found</html>", "not a picture in any of the formats"),
    (picture_bytes(0, 40, 40), "40 x 40 pixels are more than data.max_pixels=1000"),
])  # fmt: skip
def test_a_bad_picture_is_replaced_named_once_and_counted(folder, caplog, content, reason):
    config, source = folder(200, {17}, content, max_pixels=1000)
    with caplog.at_level(logging.WARNING, logger="mae_jax"):
        batches, bad = read(config, source, 30)  # three epochs
    assert bad == {17: source.name_of(17)}
    warnings = [record.message for record in caplog.records if record.name == "mae_jax"]
    assert len(warnings) == 1 and source.name_of(17) in warnings[0] and reason in warnings[0]
    indices = np.concatenate([batch["index"] for batch in batches])
    assert len(indices) == 600 and 17 not in indices
    assert set(batches[0]) == {"image", "label", "index"}
    for epoch in indices.reshape(3, 200):  # one other takes its place, in each epoch the same
        extra = np.flatnonzero(np.bincount(epoch, minlength=200) == 2)
        assert extra.tolist() == np.flatnonzero(np.bincount(indices, minlength=200) == 6).tolist() and len(extra) == 1
    assert all(batch["image"].any(axis=(1, 2, 3)).all() for batch in batches)


def test_the_name_of_a_bad_picture_is_escaped_in_the_log(folder, caplog, monkeypatch):
    config, source = folder(200, {17})
    monkeypatch.setattr(type(source), "name_of", lambda source, index: "\x1b[2J\nerror: all is lost")
    read(config, source, 10)
    assert [record.message.split(" (")[0] for record in caplog.records if record.name == "mae_jax"] == [
        r"bad picture \x1b[2J\nerror: all is lost"
    ]


def test_a_file_that_cannot_be_read_is_a_bad_picture(folder):
    config, source = folder(200, {})
    (source._folder / "00017.png").unlink()
    batches, bad = read(config, source, 10)
    assert list(bad) == [17]


def test_label_and_index_are_those_of_the_picture_that_is_shown(tmp_path, make_config):
    for i in range(200):
        name = tmp_path / f"train/class{i:03}/x.png"
        name.parent.mkdir(parents=True)
        name.write_bytes(b"" if i == 5 else picture_bytes(i))
    config = make_config(name="image_folder", path=str(tmp_path), batch_size=20, eval_fraction=0.001,
                         crop_scale=(1.0, 1.0))  # fmt: skip
    source = make_source(config, "train", (20, 24), 3)
    bad_index = next(i for i in range(len(source)) if source[i]["image"] == b"")
    iterator = make_train_batches(source, config, (20, 24), 3)
    for batch in itertools.islice(iterator, 10):
        assert bad_index not in batch["index"]
        assert batch["label"].tolist() == [source[i]["label"] for i in batch["index"]]
    iterator.close()


def test_more_than_a_hundredth_of_the_pictures_bad_is_an_error_that_names_them(folder):
    config, source = folder(200, {3, 100, 150})
    with pytest.raises(UserError) as error:
        read(config, source, 10)
    message = str(error.value)
    assert message.startswith("3 of the first ") and "\n" not in message
    assert all(source.name_of(i) in message for i in (3, 100, 150)) and "remove" in message


def test_a_hundredth_of_the_pictures_bad_is_no_error_however_early_they_come(folder):
    config, source = folder(200, {3, 100}, batch_size=1)
    _, bad = read(config, source, 400)
    assert sorted(bad) == [3, 100]


class ManyPictures:
    """20 000 pictures in memory, every `every`th of them an empty file."""

    num_classes, class_names, in_memory, picture_size = 0, None, True, None

    def __init__(self, every: int):
        self._every, self._image = every, np.full((8, 8, 3), 7, np.uint8)

    def __len__(self):
        return 20_000

    def __getitem__(self, index):
        return {"image": b"" if index % self._every == 0 else self._image, "label": -1}

    def name_of(self, index):
        return f"#{index}"


def test_of_many_pictures_the_share_of_those_read_counts_once_ten_thousand_were(make_config, caplog):
    caplog.set_level(logging.CRITICAL, logger="mae_jax")
    config = make_config(batch_size=500, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    _, bad = read(config, ManyPictures(every=125), 40)  # 0.8 %: 160, well above a hundredth of the first reads
    assert len(bad) == 160
    with pytest.raises(UserError, match=r"^1\d\d of the first") as error:  # 1.6 %: the 101st of them is too many
        read(config, ManyPictures(every=62), 40)
    assert 5_000 < int(str(error.value).split()[4]) < 8_500  # expected: 100 / 0.016 = 6 250


def test_in_a_tiny_folder_one_bad_picture_is_above_a_hundredth(folder):
    config, source = folder(50, {7})
    with pytest.raises(UserError, match="1 of the first .* of 50, cannot be used: .*00007.png"):
        read(config, source, 5)


def test_a_folder_without_one_good_picture_is_an_error(folder):
    config, source = folder(30, set(range(30)))
    with pytest.raises(UserError, match="and the 20 pictures tried in its place cannot be used"):
        read(config, source, 1)


def test_raise_stops_at_the_first_bad_picture_and_names_it(folder):
    config, source = folder(200, {17}, on_bad_image="raise")
    with pytest.raises(UserError, match="00017.png cannot be used: the file is empty; fix or remove it"):
        read(config, source, 10)


@pytest.mark.slow
def test_worker_processes_replace_and_count_as_threads_do(folder):
    config, source = folder(200, {17})
    expected, bad = read(config, source, 12)
    config.num_workers = 2
    batches, bad_in_workers = read(config, source, 12)
    assert bad_in_workers == bad == {17: source.name_of(17)}
    for one, other in zip(batches, expected, strict=True):
        np.testing.assert_array_equal(one["index"], other["index"])
        np.testing.assert_array_equal(one["image"], other["image"])


def test_evaluation_follows_the_same_policy(folder):
    config, source = folder(200, {17})
    iterator = make_eval_batches(source, config, 32, SIZE, 3)
    rows = list(iterator)
    index, weight = (np.concatenate([batch[key] for batch in rows]) for key in ("index", "weight"))
    assert weight.sum() == 200
    assert np.flatnonzero(index[:200] != np.arange(200)).tolist() == [17] and list(iterator.bad_images) == [17]
    config.on_bad_image = "raise"
    with pytest.raises(UserError, match="00017.png"):
        list(make_eval_batches(source, config, 32, SIZE, 3))


def test_a_wrong_number_of_channels_of_all_pictures_is_the_users_mistake(folder):
    config, source = folder(200, {})
    iterator = make_train_batches(source, config, SIZE, 4)
    with pytest.raises(UserError, match="00.*png and the 20 .* has 3 channels, but model.channels=4"):
        next(iterator)


def test_every_colour_mode_and_size_can_stand_in_one_batch(tmp_path, make_config):
    for i, mode in enumerate(("RGB", "L", "1", "P", "LA", "RGBA", "L", "RGB")):
        Image.new(mode, (10 + i, 30 - i)).save(tmp_path / f"{i}.png")
    config = make_config(name="image_folder", path=str(tmp_path), batch_size=7, eval_fraction=0.1)
    batches, bad = read(config, make_source(config, "train", SIZE, 3), 1)
    assert batches[0]["image"].shape == (7, 8, 8, 3) and not bad
