"""Parquet and tars: the pictures, labels and splits that are in them, and the ones that are refused."""

import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs import common
from mae_jax.data import parquet
from mae_jax.data.sources import make_sources
from mae_jax.runtime.errors import UserError

NAMES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(index: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), index, np.uint8)).save(file, "PNG")
    return file.getvalue()


def open_both(name, path, **settings):
    data = common.get_config().data
    data.update(name=name, path=str(path), **settings)
    return make_sources(data, (4, 4), 3)


def refusal(name, path, **settings) -> str:
    with pytest.raises(UserError) as error:
        open_both(name, path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_parquet(path, labels, metadata=None, rows=3, **columns):
    images = [{"bytes": png(index), "path": None} for index in range(len(labels))]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(images, struct), "label": labels, **columns})
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def write_tar(path, *members: tuple[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_parquet_has_the_schemas_class_names_the_splits_of_its_files_and_each_rows_own_bytes(tmp_path):
    labels = [2, 0, 1, 2, 0, 1, 1]
    feature = {"label": {"_type": "ClassLabel", "names": NAMES}}
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", labels, feature)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [1, 1], feature)
    train, test = open_both("parquet", tmp_path)
    assert (train.class_names, train.labels().tolist(), test.labels().tolist()) == (list(NAMES), labels, [1, 1])
    order = np.random.default_rng(0).permutation(7).tolist() * 2
    for source in (train, pickle.loads(pickle.dumps(train))):
        assert [source[index]["image"] for index in order] == [png(index) for index in order]


def test_a_row_group_is_unpacked_once_and_again_after_the_cache_is_emptied(tmp_path, monkeypatch):
    write_parquet(tmp_path / "train" / "0.parquet", [0, 1] * 4)
    write_parquet(tmp_path / "validation" / "0.parquet", [0, 1])
    train, _ = open_both("parquet", tmp_path)
    unpacked = []
    write = parquet.write_bytes
    monkeypatch.setattr(parquet, "write_bytes", lambda *parts: (unpacked.append(parts[0]), write(*parts)))
    for _ in range(2):
        assert [train[index]["image"] for index in range(8)] == [png(index) for index in range(8)]
    assert len(unpacked) == 3  # of 3 rows each
    for file in unpacked:
        file.unlink()
    with pytest.raises(FileNotFoundError):  # the loader tries again
        train[7]
    assert train[7]["image"] == png(7)


def test_a_list_of_class_labels_is_several_labels_and_a_float_column_a_number(tmp_path):
    feature = {"label": [{"_type": "ClassLabel", "names": NAMES}]}
    write_parquet(tmp_path / "train.parquet", [[0, 2], [1], [0]] * 2, feature, age=[0.5, 1, 2] * 2)
    write_parquet(tmp_path / "val.parquet", [[2]], feature, age=[3.0])
    train, val = open_both("parquet", tmp_path)
    assert train.label_kind == "multi" and train.class_names == list(NAMES)
    assert train.labels()[:3].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 0]] and val.labels().tolist() == [[0, 0, 1]]
    train, val = open_both("parquet", tmp_path, label_column="age", label_kind="number")
    assert train.labels().tolist() == [[0.5], [1], [2]] * 2 and val.labels().tolist() == [[3]]


def test_parquet_without_pictures_with_paths_only_or_cut_short_is_refused_in_one_line(tmp_path):
    (tmp_path / "numbers").mkdir()
    pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "numbers" / "train.parquet")
    assert "no column has pictures as bytes" in refusal("parquet", tmp_path / "numbers")
    (tmp_path / "paths").mkdir()
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": None, "path": "a.jpg"}] * 3, struct)
    pq.write_table(pa.table({"image": images}), tmp_path / "paths" / "train.parquet")
    assert "no bytes, only paths" in refusal("parquet", tmp_path / "paths")
    write_parquet(tmp_path / "cut" / "train.parquet", [0, 1] * 9)
    whole = (tmp_path / "cut" / "train.parquet").read_bytes()
    (tmp_path / "cut" / "train.parquet").write_bytes(whole[: len(whole) // 2])
    assert "cut/train.parquet cannot be read as parquet" in refusal("parquet", tmp_path / "cut")
    (tmp_path / "empty").mkdir()
    assert "holds no file ending in .parquet, but nothing" in refusal("parquet", tmp_path / "empty")


def test_tars_have_the_pictures_and_labels_of_their_keys_wherever_their_members_stand(tmp_path):
    members = [(f"{index}.png", png(index)) for index in range(6)]
    classes = [(f"{index}.cls", NAMES[index % 3].encode()) for index in range(6)]
    write_tar(tmp_path / "train-000.tar", *members[:3], *classes[:3])
    write_tar(tmp_path / "train-001.tar", *classes[3:], *members[3:])
    write_tar(
        tmp_path / "val-000.tar",
        ("x/0.PNG", png(9)),
        ("x/0.json", b'{"label": "cat", "place": "north"}'),
        ("x/0.cls", b"bee"),
    )
    train, val = open_both("webdataset", tmp_path)
    assert train.class_names == list(NAMES) and train.labels().tolist() == [0, 1, 2] * 2
    assert {train[index]["image"] for index in range(6)} == {png(index) for index in range(6)}
    assert [(train[i]["image"], train[i]["label"]) for i in range(6)] == [(png(i), i % 3) for i in range(6)]
    assert val[0]["image"] == png(9)
    other = pickle.loads(pickle.dumps(train))
    assert other[4]["image"] == png(4)


def test_the_index_of_a_tar_is_made_once_and_anew_when_the_tar_has_changed(tmp_path, monkeypatch):
    tar = tmp_path / "train.tar"
    write_tar(tar, *[(f"{index}.png", png(index)) for index in range(4)])
    assert len(open_both("webdataset", tar, eval_fraction=0.5)[0]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert len(open_both("webdataset", tar, eval_fraction=0.5)[0]) == 2
    write_tar(tar, *[(f"{index}.png", png(index)) for index in range(8)])
    assert len(open_both("webdataset", tar, eval_fraction=0.5)[0]) == 4


@pytest.mark.parametrize("members, words", [
    ([("a.png", b"1"), ("a.jpg", b"2")], ("key a should have one picture, but its pictures are .png, .jpg",)),
    ([("a.png", b"1"), ("b.cls", b"2")], ("key b has no picture",)),
    ([("a.cls", b"1")], ("has no picture",)),
    ([("a.mp3", b"1")], ("holds no picture",)),
])  # fmt: skip
def test_keys_that_do_not_have_one_picture_are_refused_with_the_shard_and_the_key(tmp_path, members, words):
    write_tar(tmp_path / "train.tar", *members)
    text = refusal("webdataset", tmp_path)
    assert str(tmp_path / "train.tar") in text and all(word in text for word in words)


def test_one_of_two_pictures_of_a_key_can_be_chosen(tmp_path):
    write_tar(tmp_path / "train.tar", *[(f"{i}.{e}", f"{i}{e}".encode()) for i in range(3) for e in ("png", "jpg")])
    train, _ = open_both("webdataset", tmp_path, image_column="jpg")
    assert train[0]["image"].endswith(b"jpg")


@pytest.mark.parametrize("size", [700, 1400, 2048])
def test_a_tar_that_is_cut_short_or_compressed_is_refused(tmp_path, size):
    tar = tmp_path / "train.tar"
    write_tar(tar, *[(f"{index}.png", bytes(600)) for index in range(2)])
    content = tar.read_bytes()
    tar.write_bytes(content[:size])
    assert f"{tar} cannot be read as an uncompressed tar" in refusal("webdataset", tmp_path)
    import gzip

    tar.write_bytes(gzip.compress(content))
    assert "decompress it" in refusal("webdataset", tmp_path)
