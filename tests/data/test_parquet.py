"""Parquet: the pictures, labels and splits that are in such files, how they are read, and what is refused."""

import json
import os
import pickle
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mae_jax.data.row_groups import RowGroups
from mae_jax.runtime.errors import UserError
from tests.data.conftest import picture_bytes

NAMES = ["ant", "bee", "cat"]
CLASSES = {"label": {"_type": "ClassLabel", "names": NAMES}}
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
# As Hugging Face's datasets writes pictures today; and as it did before, and pandas does.
FORMS = {"plain": {"compression": "none", "use_dictionary": False}, "packed": {}}


@pytest.fixture(autouse=True)
def cache(own_cache):
    return own_cache


def png(index: int) -> bytes:
    return picture_bytes(index, 4, 5)


def write(path, labels, features=None, images=None, form="plain", **columns):
    """A file with pictures 0, 1, ..., three in a row group."""
    images = images or [png(index) for index in range(len(labels))]
    structs = pa.array([{"bytes": image, "path": None} for image in images], STRUCT)
    table = pa.table({"image": structs, "label": labels, **columns})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3, **FORMS.get(form, {"compression": "none", "use_dictionary": True}))


@pytest.mark.parametrize("form", FORMS)
def test_each_row_has_its_own_picture_its_label_by_name_and_the_split_of_its_file(tmp_path, open_both, form):
    labels = [2, 0, 1, 2, 0, 1, 1]
    write(tmp_path / "data" / "train-00000-of-00002.parquet", labels[:4], CLASSES, [*map(png, range(4))], form)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", labels[4:], CLASSES, [*map(png, range(4, 7))], form)
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [1, 1], CLASSES, form=form)
    train, test = open_both("parquet", tmp_path)
    assert (train.class_names, train.labels().tolist(), test.labels().tolist()) == (NAMES, labels, [1, 1])
    assert train.name_of(5) == f"row 2 of {tmp_path}/data/train-00001-of-00002.parquet"
    order = np.random.default_rng(0).permutation(7).tolist() * 2
    for source in (train, pickle.loads(pickle.dumps(train))):
        assert [source[index]["image"] for index in order] == [png(index) for index in order]


def test_pictures_that_lie_in_the_file_as_they_are_are_found_once_and_not_copied(
    tmp_path, open_both, cache, monkeypatch
):
    file = tmp_path / "train.parquet"
    write(file, [0] * 8)
    write(tmp_path / "val.parquet", [0])
    train, _ = open_both("parquet", tmp_path)
    assert [train[index]["image"] for index in range(8)] == [png(index) for index in range(8)]
    assert not list(cache.rglob("*.pictures"))
    monkeypatch.setattr(RowGroups, "_cells", None)  # another run
    assert open_both("parquet", tmp_path)[0][7]["image"] == png(7)


def test_repeated_pictures_are_found_in_a_dictionary(tmp_path, open_both, cache):
    indices = [0, 1, 0, 1, 1, 1, 2, 0, 2]
    write(tmp_path / "train.parquet", indices, images=[*map(png, indices)], form="dictionary")
    write(tmp_path / "val.parquet", [0])
    train, _ = open_both("parquet", tmp_path)
    assert [train[row]["image"] for row in range(9)] == [png(index) for index in indices]
    assert not list(cache.rglob("*.pictures"))


def test_compressed_pictures_are_unpacked_once_which_a_note_tells_and_again_if_the_cache_is_emptied(
    tmp_path, open_both, cache
):
    write(tmp_path / "train.parquet", [0] * 8, form="packed")
    write(tmp_path / "val.parquet", [0])
    train, val = open_both("parquet", tmp_path)
    assert any(note.startswith("pictures are unpacked") and note.endswith(str(cache)) for note in val.notes)
    times = []
    for _ in range(3):
        assert [train[index]["image"] for index in range(8)] == [png(index) for index in range(8)]
        files = sorted(cache.rglob("*.pictures"))
        times.append([file.stat().st_mtime_ns for file in files])
        if len(times) == 2:
            shutil.rmtree(cache)
    assert len(times[0]) == 3 and times[0] == times[1] != times[2]
    assert not any("unpacked" in note for note in open_both("parquet", tmp_path)[1].notes)


def test_what_was_unpacked_of_a_file_that_has_changed_is_deleted(tmp_path, open_both, cache):
    for seed in (0, 50):
        write(tmp_path / "train.parquet", [0] * 3, images=[png(seed + row) for row in range(3)], form="packed")
        write(tmp_path / "val.parquet", [0])
        os.utime(tmp_path / "train.parquet", (seed, seed))
        train, _ = open_both("parquet", tmp_path)
        assert train[1]["image"] == png(seed + 1)
    assert len(list(cache.rglob("*.pictures"))) == 1
    os.utime(tmp_path / "train.parquet", (9, 9))
    with pytest.raises(OSError, match="has changed since it was opened"):
        pickle.loads(pickle.dumps(train))[0]


@pytest.mark.parametrize("form", FORMS)
def test_many_threads_read_the_same_row_groups(tmp_path, open_both, form):
    write(tmp_path / "train.parquet", [0] * 60, form=form)
    write(tmp_path / "val.parquet", [0])
    train, _ = open_both("parquet", tmp_path)
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(60), 5)).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda row: train[row]["image"], rows))
    assert found == [png(row) for row in rows]


def test_without_a_cache_plain_pictures_are_read_and_compressed_ones_refused(tmp_path, open_both, refusal, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write(tmp_path / "plain" / "train.parquet", [0] * 5)
    assert len(open_both("parquet", tmp_path / "plain", eval_fraction=0.5)[0][0]["image"]) > 0
    write(tmp_path / "packed" / "train.parquet", [0] * 5, form="packed")
    text = refusal("parquet", tmp_path / "packed")
    assert "cannot be made (Not a directory)" in text and "XDG_CACHE_HOME" in text


def test_a_full_cache_is_not_a_bad_picture(tmp_path, open_both, refusal, monkeypatch):
    write(tmp_path / "train.parquet", [0] * 5, form="packed")
    train, _ = open_both("parquet", tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mae_jax.data.row_groups.write_bytes", full)
    with pytest.raises(UserError, match="cannot be unpacked into the cache .*: No space left on device: make room"):
        train[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    assert "has room for 0 MiB" in refusal("parquet", tmp_path)


def test_a_list_of_class_labels_is_several_labels_and_a_float_column_a_number(tmp_path, open_both):
    features = {"label": [CLASSES["label"]]}
    write(tmp_path / "train.parquet", [[0, 2], [1], [0]] * 2, features, age=[0.5, 1, 2] * 2)
    write(tmp_path / "val.parquet", [[2]], features, age=[3.0])
    train, val = open_both("parquet", tmp_path)
    assert train.label_kind == "multi" and train.class_names == NAMES
    assert train.labels()[:3].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]] and val.labels().tolist() == [[0, 0, 1]]
    train, val = open_both("parquet", tmp_path, label_column="age", label_kind="number")
    assert train.labels().tolist() == [[0.5], [1], [2]] * 2 and val.labels().tolist() == [[3]]


def test_a_file_without_splits_has_a_share_held_out_by_the_names_of_its_rows_wherever_it_lies(tmp_path, open_both):
    for folder in ("here", "there"):
        write(tmp_path / folder / "pictures.parquet", [0, 1] * 10)
    held = [
        {source[index]["image"] for index in range(len(source))}
        for folder in ("here", "there")
        for source in open_both("parquet", tmp_path / folder, eval_fraction=0.2)
    ]
    assert [len(some) for some in held] == [16, 4, 16, 4] and held[:2] == held[2:] and not held[0] & held[1]
    assert len(open_both("parquet", tmp_path / "here" / "pictures.parquet", eval_fraction=0.2)[1]) == 4


def test_a_column_of_splits_counts_where_the_files_names_tell_none(tmp_path, open_both):
    write(tmp_path / "all.parquet", [0] * 6, split=["train", "test"] * 3)
    train, test = open_both("parquet", tmp_path)
    assert [test[index]["image"] for index in range(3)] == [png(1), png(3), png(5)] and len(train) == 3


def test_rows_without_a_picture_and_damaged_row_groups_are_bad_pictures(tmp_path, open_both):
    images = [png(0), None, png(2), *(os.urandom(3000) for _ in range(3))]
    write(tmp_path / "train.parquet", [0] * 6, images=images, form="packed")
    write(tmp_path / "val.parquet", [0])
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    middle = content.find(images[4][:500])
    content[middle - 4 : middle + 10] = bytes([255] * 14)  # a length, among others
    (tmp_path / "train.parquet").write_bytes(content)
    train, _ = open_both("parquet", tmp_path)
    assert train[2]["image"] == png(2)
    for row, words in ((1, "has no picture"), (4, "row group 1 is damaged")):
        with pytest.raises(OSError, match=words):
            train[row]


def test_parquet_without_pictures_with_paths_only_or_cut_short_is_refused_in_one_line(tmp_path, refusal):
    (tmp_path / "numbers").mkdir()
    pq.write_table(pa.table({"file": ["a.jpg"], "path": ["b"]}), tmp_path / "numbers" / "train.parquet")
    text = refusal("parquet", tmp_path / "numbers")
    assert "no column has pictures" in text and "file, path" in text and "data.name=table" in text
    (tmp_path / "paths").mkdir()
    pq.write_table(pa.table({"image": pa.array([{"path": "a.jpg"}] * 3, STRUCT)}), tmp_path / "paths" / "train.parquet")
    assert "no bytes, only paths" in refusal("parquet", tmp_path / "paths")
    write(tmp_path / "cut" / "train.parquet", [0, 1] * 9)
    whole = (tmp_path / "cut" / "train.parquet").read_bytes()
    (tmp_path / "cut" / "train.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cut/train.parquet cannot be read as parquet" in refusal("parquet", tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    assert "holds no file ending in .parquet, but nothing" in refusal("parquet", tmp_path / "empty")


def test_files_that_are_not_alike_and_pictures_in_several_columns_are_refused(tmp_path, open_both, refusal):
    write(tmp_path / "columns" / "train.parquet", [0])
    write(tmp_path / "columns" / "val.parquet", [0], more=[1])
    assert "val.parquet has the columns image, label, more, but" in refusal("parquet", tmp_path / "columns")
    write(tmp_path / "classes" / "train.parquet", [0], CLASSES)
    write(tmp_path / "classes" / "val.parquet", [0], {"label": {"names": ["bee", "ant"]}})
    assert "val.parquet has other classes than" in refusal("parquet", tmp_path / "classes")
    many = pa.table({name: [png(index)] * 4 for index, name in enumerate(("left", "right"))})
    pq.write_table(many, tmp_path / "many.parquet")
    assert "which of left, right has the pictures?" in refusal("parquet", tmp_path / "many.parquet")
    assert "only left, right has" in refusal("parquet", tmp_path / "many.parquet", image_column="label")
    train, _ = open_both("parquet", tmp_path / "many.parquet", image_column="right", eval_fraction=0.5)
    assert train[0]["image"] == png(1)


def test_a_data_set_of_the_hub_needs_a_name_and_the_package_datasets(refusal, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal("parquet", "hf://owner/name") == ("data.path=hf://owner/name needs a package: pip install datasets")
    assert "is no name of the hub" in refusal("parquet", "hf://a/b/c/d")


def test_there_may_be_more_files_than_a_process_can_have_open(tmp_path, open_both):
    for number in range(40):
        write(tmp_path / f"train-{number:03d}.parquet", [0, 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        train, _ = open_both("parquet", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(train) == 72
