"""Tars of WebDataset: the pictures, labels and splits that are in them, and what is refused; which shards are found."""

import gzip
import io
import pickle
import tarfile

import pytest

from mae_jax.data.shards import find_shards
from tests.data.conftest import picture_bytes

NAMES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True)
def cache(own_cache):
    return own_cache


def png(index: int) -> bytes:
    return picture_bytes(index, 4, 5)


def write_tar(path, *members: tuple[str, bytes], kind=tarfile.REGTYPE):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            tar.addfile(member, io.BytesIO(content))


def test_tars_have_the_pictures_and_labels_of_their_keys_wherever_their_members_stand(tmp_path, open_both):
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


def test_the_index_of_a_tar_is_made_once_and_anew_when_the_tar_has_changed(tmp_path, open_both, monkeypatch):
    tar = tmp_path / "train.tar"
    write_tar(tar, *[(f"{index}.png", png(index)) for index in range(4)])
    assert len(open_both("webdataset", tar, eval_fraction=0.5)[0]) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        assert len(open_both("webdataset", tar, eval_fraction=0.5)[0]) == 2
    write_tar(tar, *[(f"{index}.png", png(index)) for index in range(8)])
    assert len(open_both("webdataset", tar, eval_fraction=0.5)[0]) == 4


@pytest.mark.parametrize("members, words", [
    ([("a.png", b"1"), ("a.jpg", b"2")], ("key a must have one picture, but it has .png and .jpg: set",)),
    ([("a.png", b"1"), ("b.png", b"1"), ("a.png", b"2")], ("key a must", "has .png and .png: make the tar again",)),
    ([("a.png", b"1"), ("b.cls", b"2")], ("key b has no picture",)),
    ([("a.cls", b"1")], ("has no picture",)),
    ([("a.mp3", b"1")], ("holds no picture",)),
])  # fmt: skip
def test_keys_that_do_not_have_one_picture_are_refused_with_the_shard_and_the_key(tmp_path, refusal, members, words):
    write_tar(tmp_path / "train.tar", *members)
    text = refusal("webdataset", tmp_path)
    assert str(tmp_path / "train.tar") in text and all(word in text for word in words)


def test_one_of_two_pictures_of_a_key_can_be_chosen(tmp_path, open_both):
    write_tar(tmp_path / "train.tar", *[(f"{i}.{e}", f"{i}{e}".encode()) for i in range(3) for e in ("png", "jpg")])
    train, _ = open_both("webdataset", tmp_path, image_column=".JPG")
    assert train[0]["image"].endswith(b"jpg")


@pytest.mark.parametrize("size", [700, 1400, 2048])
def test_a_tar_that_is_cut_short_or_compressed_is_refused(tmp_path, refusal, size):
    tar = tmp_path / "train.tar"
    write_tar(tar, *[(f"{index}.png", bytes(600)) for index in range(2)])
    content = tar.read_bytes()
    tar.write_bytes(content[:size])
    assert f"{tar} cannot be read as an uncompressed tar" in refusal("webdataset", tmp_path)
    tar.write_bytes(gzip.compress(content))
    assert "decompress it" in refusal("webdataset", tmp_path)


def test_labels_splits_and_groups_may_be_fields_of_json_and_other_fields_are_not_kept_in_memory(tmp_path, open_both):
    facts = [b'{"species": "%s", "split": "%s", "caption": "long"}' % pair for pair in
             [(b"elk", b"train"), (b"ant", b"train"), (b"elk", b"val")]]  # fmt: skip
    write_tar(tmp_path / "a.tar", *[(f"{i}.json", fact) for i, fact in enumerate(facts)],
              *[(f"{i}.png", png(i)) for i in range(3)])  # fmt: skip
    train, val = open_both("webdataset", tmp_path / "a.tar", label_column="species")
    assert (train.class_names, train.labels().tolist(), val.labels().tolist()) == (["ant", "elk"], [1, 0], [1])
    assert train.name_of(1) == f"{tmp_path}/a.tar: key 1"
    assert b"long" not in pickle.dumps(vars(train))


def test_pictures_are_held_out_by_shard_and_key_wherever_the_tars_lie(tmp_path, open_both):
    held = []
    for folder in ("here", "there"):
        for shard in range(2):  # keys may begin anew in each shard, and shards in each folder
            members = [(f"{i}.png", png(10 * shard + i)) for i in range(10)]
            write_tar(tmp_path / folder / str(shard) / "0.tar", *members)
        sources = open_both("webdataset", tmp_path / folder, eval_fraction=0.2)
        held += [{source[index]["image"] for index in range(len(source))} for source in sources]
    assert [len(some) for some in held] == [16, 4, 16, 4] and held[:2] == held[2:] and not held[0] & held[1]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_in_other_encodings_are_keys_too(tmp_path, open_both, form):
    keys = ["x" * 150 + str(number) for number in range(3)] + ["caf\udce9"]
    with tarfile.open(tmp_path / "train.tar", "w", format=form) as tar:
        for number, key in enumerate(keys):
            member = tarfile.TarInfo(f"./deep/{key}.png")
            member.size = len(png(number))
            tar.addfile(member, io.BytesIO(png(number)))
    sources = open_both("webdataset", tmp_path, eval_fraction=0.5)
    found = {source.name_of(index): source[index]["image"] for source in sources for index in range(len(source))}
    assert found == {f"{tmp_path}/train.tar: key deep/{key}": png(number) for number, key in enumerate(keys)}


def test_a_picture_that_is_a_link_in_a_tar_is_refused(tmp_path, refusal):
    write_tar(tmp_path / "train.tar", ("a.png", b""), kind=tarfile.LNKTYPE)
    assert "a.png is a link or has holes" in refusal("webdataset", tmp_path)


def test_a_tar_that_is_cut_short_after_it_was_opened_has_bad_pictures(tmp_path, open_both):
    write_tar(tmp_path / "train.tar", *[(f"{i}.png", png(i)) for i in range(4)])
    train, _ = open_both("webdataset", tmp_path, eval_fraction=0.25)
    with open(tmp_path / "train.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(OSError, match="shorter than when it was indexed"):
        train[2]


def test_without_a_cache_tars_are_indexed_each_time(tmp_path, open_both, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_tar(tmp_path / "train.tar", *[(f"{i}.png", png(i)) for i in range(4)])
    assert len(open_both("webdataset", tmp_path / "train.tar", eval_fraction=0.5)[0]) == 2


def test_the_split_of_a_shard_is_in_its_name_or_else_in_the_name_of_a_folder(tmp_path, make_config):
    names = {
        "data/train-00000-of-00002.parquet": "train", "imagenet1k-validation-07.parquet": "validation",
        "val/000.parquet": "val", "en/Test/0.parquet": "Test", "val2017.parquet": "val",
        "train/dev-0.parquet": "train", "trainings-0.parquet": None, "train/test.parquet": "test",
    }  # fmt: skip
    for name in (*names, ".hidden.parquet", "train/.cache/0.parquet", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    data = make_config(path=str(tmp_path))
    assert {shard.name: shard.split for shard in find_shards(data, ".parquet", "files")} == names


def test_the_words_that_settings_name_are_splits_of_shards_too_but_not_inside_other_words(tmp_path, open_both):
    for number, name in enumerate(("photos2019-0", "fold1/2019_1", "photos-20190-2", "a2020", "2020/3", "my-train")):
        write_tar(tmp_path / f"{name}.tar", (f"{name[0]}.png", png(number)))
    train, evaluation = open_both("webdataset", tmp_path, train_split="2019", eval_split="2020")
    assert [source[index]["image"] for source in (train, evaluation) for index in range(2)] == [
        png(1), png(0), png(4), png(3)
    ]  # fmt: skip
    assert (len(train), len(evaluation)) == (2, 2) and "splits that are not used: train" in evaluation.notes
    train, evaluation = open_both("webdataset", tmp_path, train_split="", eval_split="FOLD1")
    assert (len(train), len(evaluation)) == (5, 1)


def test_packed_shards_are_not_left_out_without_a_word(tmp_path, refusal):
    write_tar(tmp_path / "train-0.tar", ("a.png", png(0)))
    (tmp_path / "train-1.tar.gz").touch()
    assert "must hold uncompressed tars: unpack train-1.tar.gz" in refusal("webdataset", tmp_path)
