"""Prepared data: what the task prepare writes, and what reading it gives."""

import hashlib
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from configs.common import get_config
from mae_jax.data import preparing
from mae_jax.data.converting import reduced
from mae_jax.data.preparing import prepare
from mae_jax.data.sources import Source, make_source, make_sources
from mae_jax.data.statistics import take_statistics
from mae_jax.runtime.errors import UserError
from tests.data.conftest import picture_bytes

NAMES = [f"{split}/{kind}/{n}.png" for split in ("train", "val") for kind in ("ant", "bee") for n in range(5)]


class Stacks(Source):
    """Six stacks of 4 bands, uint16, each with two numbers."""

    label_kind, class_names = "number", ["height", "age"]

    def __init__(self, split, *others):
        self.place = f"in stacks {split}"

    def __len__(self):
        return 6

    def __getitem__(self, index):
        values = np.random.default_rng(index).integers(0, 4096, (12, 20, 4)).astype(np.uint16)
        return {"image": values, "label": np.asarray([index, np.nan if index == 2 else 0.5], np.float32)}


@pytest.fixture
def config(tmp_path, write_pictures):
    """The settings of the task, for a folder of 10 pictures for training and as many for evaluation."""
    write_pictures(tmp_path / "pictures", *NAMES)
    found = get_config()
    found.given = ()
    found.data.update(name="image_folder", path=str(tmp_path / "pictures"))
    found.prepare.shard_examples = 4
    return found


def prepared(config, folder, **settings):
    folder.mkdir(exist_ok=True)
    found = prepare(config, folder)
    return found, make_sources(prepared_data(folder, **settings), (8, 8), 3)


def prepared_data(folder, **settings):
    data = get_config().data
    data.update(name="prepared", path=str(folder), **settings)
    return data


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_a_new_size_order_labels_names_and_bytes_are_those_of_the_source(tmp_path, config):
    about, sources = prepared(config, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.array_record"))) == 6
    for own, source in zip(sources, make_sources(config.data, (8, 8), 3), strict=True):
        assert len(own) == len(source) == 10 and own.class_names == source.class_names == ["ant", "bee"]
        assert own.labels().tolist() == source.labels().tolist() and own.labels().dtype == np.int64
        for index in range(10):
            assert own[index] == source[index] and own.name_of(index) == source.name_of(index)
    assert about["splits"]["train"]["counts"] == {"ant": 5, "bee": 5}
    assert (about["picture_size"], sources[0].picture_size) == ([20, 24], (20, 24))
    values = np.stack([np.asarray(Image.open(io.BytesIO(picture_bytes(n)))) for n in range(10)]) / 255
    np.testing.assert_allclose(about["mean"], values.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(about["std"], values.std((0, 1, 2)), rtol=1e-12)


def test_arrays_and_numbers_are_kept_and_their_statistics_are_a_runs(tmp_path, config):
    config.data.update(name=f"{__name__}:Stacks", path=None)
    _, (train, _) = prepared(config, tmp_path / "shards")
    for index in range(6):
        np.testing.assert_array_equal(train[index]["image"], Stacks("train")[index]["image"])
        np.testing.assert_array_equal(train[index]["label"], Stacks("train")[index]["label"])
    assert (train.label_kind, train.class_names) == ("number", ["height", "age"])
    np.testing.assert_array_equal(train.labels(), Stacks("train").labels())
    config.data, config.model.channels = prepared_data(tmp_path / "shards"), 4
    [note] = take_statistics(config)
    values = np.concatenate([Stacks("train")[n]["image"].reshape(-1, 4) for n in range(6)]).astype(np.float64)
    np.testing.assert_allclose(config.data.mean, values.mean(0), rtol=1e-12)
    assert str(tmp_path / "shards") in note
    # A checkpoint of other channels (init_channels) knows no values, one of such pictures does.
    assert take_statistics(config, {"data": {}}) == [note]
    assert take_statistics(config, {"data": config.data.to_dict()}) == []


def test_with_a_new_size_large_pictures_are_reduced_once_and_greys_stay_grey(tmp_path, config):
    folder = tmp_path / "pictures/train/ant"
    Image.open(io.BytesIO(picture_bytes(0, 60, 90))).save(folder / "0.png")
    Image.open(io.BytesIO(picture_bytes(1, 60, 90))).convert("L").save(folder / "1.png")
    config.prepare.short_side = 20
    _, (train, _) = prepared(config, tmp_path / "shards")
    colour, grey, small = (Image.open(io.BytesIO(train[n]["image"])) for n in range(3))
    assert (colour.format, colour.mode, colour.size) == ("JPEG", "RGB", (30, 20))
    assert (grey.format, grey.mode, grey.size) == ("JPEG", "L", (30, 20))
    assert train[2]["image"] == picture_bytes(2) and small.size == (24, 20)
    wanted = Image.open(folder / "1.png").resize((30, 20), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(grey, int) - np.asarray(wanted, int)).mean() < 3  # a JPEG of quality 95


def test_deep_arrays_are_reduced_at_full_depth(tmp_path, config):
    config.data.update(name=f"{__name__}:Stacks", path=None)
    config.prepare.short_side = 6
    _, (train, _) = prepared(config, tmp_path / "shards")
    plane = Image.fromarray(Stacks("train")[3]["image"][..., 1].astype(np.float32))
    wanted = np.asarray(plane.resize((10, 6), Image.Resampling.BICUBIC))
    found = train[3]["image"]
    found = np.load(io.BytesIO(found)) if isinstance(found, bytes) else found
    assert found.dtype == np.uint16
    np.testing.assert_allclose(found[..., 1], np.clip(wanted, 0, 65535), atol=0.51)


@pytest.mark.parametrize(
    "size, wanted", [((300, 400), (150, 200)), ((401, 300), (200, 150)), ((150, 9999), (150, 9999))]
)
def test_the_shorter_side_becomes_what_was_asked_for(size, wanted):
    assert reduced(size, 150) == wanted


def test_a_stopped_run_goes_on_to_the_same_bytes_as_one_that_was_not(tmp_path, config, monkeypatch):
    prepared(config, tmp_path / "whole")
    facts, calls, stopped = preparing._facts, [], tmp_path / "stopped"

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return facts(*arguments)

    monkeypatch.setattr(preparing, "_facts", killed)
    with pytest.raises(KeyboardInterrupt):
        prepared(config, stopped)
    with pytest.raises(UserError, match="stopped is only half prepared: run the same command of configs/prepare.py"):
        make_source(prepared_data(stopped), "train", (8, 8), 3)
    (stopped / "train-00002-of-00003.array_record.tmp").write_bytes(b"left by SIGKILL")
    prepared(config, stopped)
    assert len(calls) == 3 + 4  # two shards of six were there
    assert content(stopped) == content(tmp_path / "whole")


def test_what_is_prepared_is_left_alone(tmp_path, config):
    prepared(config, tmp_path / "shards")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert prepare(config, tmp_path / "shards") is None
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before


def test_other_settings_and_data_are_refused_in_the_same_folder(tmp_path, config, monkeypatch):
    prepared(config, tmp_path / "shards")
    config.prepare.short_side = 16
    with pytest.raises(
        UserError, match="data prepared with prepare.quality=None, not 95|prepare.short_side=None, not 16"
    ):
        prepare(config, tmp_path / "shards")
    config.prepare.short_side = None
    monkeypatch.setattr(preparing, "_finish", None)
    with pytest.raises(TypeError):
        prepared(config, tmp_path / "half")
    (tmp_path / "pictures/train/ant/9.png").write_bytes(picture_bytes(99))
    with pytest.raises(UserError, match="half is half prepared from data that have changed since"):
        prepare(config, tmp_path / "half")


def test_a_bad_picture_is_left_out_and_named_where_it_is_rare(tmp_path, config, write_pictures):
    folder = tmp_path / "pictures"
    write_pictures(folder, *(f"train/ant/{n}.png" for n in range(10, 110)))
    (folder / "train/bee/2.png").write_bytes(b"")
    _, (train, evaluation) = prepared(config, tmp_path / "shards")
    assert len(train) == 109 and all("bee/2.png" not in train.name_of(index) for index in range(109))
    assert train.labels().tolist().count(1) == 4
    assert evaluation.notes == [
        f"bad pictures, left out when it was prepared: {folder}/train/bee/2.png (the file is empty)"
    ]
    config.data.on_bad_image = "raise"
    (tmp_path / "strict").mkdir()
    with pytest.raises(UserError, match="train/bee/2.png cannot be used: the file is empty; fix or remove it"):
        prepare(config, tmp_path / "strict")


def test_more_than_a_hundredth_of_bad_pictures_is_an_error(tmp_path, config):
    (tmp_path / "pictures/train/bee/2.png").write_bytes(b"")
    (tmp_path / "shards").mkdir()
    with pytest.raises(UserError, match="1 of the first 10 pictures, of 20, cannot be used: .*bee/2.png.*up to 1 %"):
        prepare(config, tmp_path / "shards")
    assert not (tmp_path / "shards/description.json").exists()


def test_checksums_are_those_that_sha256sum_computes(tmp_path, config):
    prepared(config, tmp_path / "shards")
    for line in (tmp_path / "shards/SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / "shards" / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("damage, message", [
    (lambda file: file.unlink(), "train-00001-of-00003.array_record is missing"),
    (lambda file: file.write_bytes(file.read_bytes()[:-9]), "of-00003.array_record has [0-9,]+ bytes instead of"),
])  # fmt: skip
def test_missing_and_truncated_shards_are_found_before_reading(tmp_path, config, damage, message):
    prepared(config, tmp_path / "shards")
    damage(tmp_path / "shards/train-00001-of-00003.array_record")
    with pytest.raises(UserError, match=f"{message}.*prepare the data again"):
        make_source(prepared_data(tmp_path / "shards"), "train", (8, 8), 3)


def test_a_record_whose_bytes_have_changed_is_a_bad_picture(tmp_path, config):
    prepared(config, tmp_path / "shards")
    file = tmp_path / "shards/train-00000-of-00003.array_record"
    data = bytearray(file.read_bytes())
    data[300:900] = bytes(600)
    file.write_bytes(data)
    source = make_source(prepared_data(tmp_path / "shards"), "train", (8, 8), 3)
    with pytest.raises(OSError):
        [source[index] for index in range(4)]
    assert source[5]["label"] == 1 and "pictures" in source.name_of(5)


@pytest.mark.parametrize("text, message", [
    (None, "has no description.json: name a folder that configs/prepare.py has made"),
    ("{}", "is not of the format 1 of prepared data"),
    ("{", "has no description.json"),
])  # fmt: skip
def test_other_folders_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "description.json").write_text(text)
    with pytest.raises(UserError, match=message):
        make_source(prepared_data(tmp_path), "eval", (8, 8), 3)


def test_a_split_without_pictures_is_told(tmp_path, config):
    config.data.update(path=str(tmp_path / "pictures/val"), eval_fraction=1.0)
    (tmp_path / "shards").mkdir()
    about = prepare(config, tmp_path / "shards")
    assert about["splits"]["train"]["examples"] == 0
    data = prepared_data(tmp_path / "shards")
    assert len(make_source(data, "eval", (8, 8), 3)) == 10
    with pytest.raises(UserError, match="was prepared from data without training pictures"):
        make_source(data, "train", (8, 8), 3)


def test_a_prepared_source_can_be_pickled(tmp_path, config):
    _, (train, _) = prepared(config, tmp_path / "shards")
    assert pickle.loads(pickle.dumps(train))[3] == train[3]


def test_the_description_is_json_that_says_what_is_where(tmp_path, config):
    prepared(config, tmp_path / "shards")
    about = json.loads((tmp_path / "shards/description.json").read_text())
    assert about["settings"]["data.path"] == str(tmp_path / "pictures") and about["dtype"] == "uint8"
    assert sum(shard["examples"] for shard in about["splits"]["eval"]["shards"]) == 10
    assert all((tmp_path / "shards" / shard["file"]).stat().st_size == shard["bytes"]
               for split in about["splits"].values() for shard in split["shards"])  # fmt: skip
