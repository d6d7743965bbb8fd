"""Pictures that a table names, with their labels, splits and groups; and tables that are refused, with the line."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.loader import make_train_batches
from mae_jax.data.sources import Labelled, make_source, make_sources
from mae_jax.runtime.errors import UserError
from tests.data.conftest import assert_same, picture_bytes


@pytest.fixture
def table(tmp_path):
    """Returns a function that writes a table, and empty files that it names: text -> its path."""

    def write(text, *files, name="labels.csv"):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).touch()
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.fixture
def open_table(make_config):
    """Returns a function: the table's path, by settings -> (training, evaluation) pictures."""

    def both(path, **settings):
        return make_sources(make_config(name="table", path=path, **settings), (8, 8), 3)

    return both


@pytest.fixture
def refused(open_table):
    def refuse(path, **settings):
        with pytest.raises(UserError) as error:
            open_table(path, **settings)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refuse


def rows(*names, ending="") -> str:
    return "".join(f"{name}{ending}\n" for name in names)


def files_of(source) -> list[str]:
    return [place.rsplit("/", 1)[1] for place in source.places()]


ABCD = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
SPLIT = "file,label,split\na.jpg,cat,train\nb.jpg,dog,train\nc.jpg,dog,val\nd.jpg,cat,test\n"


def test_columns_give_files_labels_and_splits(table, open_table):
    train, evaluation = open_table(table(SPLIT, *ABCD))
    assert (files_of(train), files_of(evaluation)) == (["a.jpg", "b.jpg"], ["c.jpg"])
    assert train.class_names == evaluation.class_names == ["cat", "dog"] and train.label_kind == "class"
    assert (train.labels().tolist(), evaluation.labels().tolist()) == ([0, 1], [1])
    assert "splits that are not used: test" in evaluation.notes


@pytest.mark.parametrize("form", ["semicolons", "tabs", "tsv", "bom", "carriage returns", "quotes", "empty lines"])
def test_tables_are_read_as_spreadsheets_write_them(form, table, open_table):
    text, name = SPLIT, "labels.csv"
    if form == "semicolons":
        text = text.replace(",", ";")
    elif form in ("tabs", "tsv"):
        text, name = text.replace(",", "\t"), "labels.tsv" if form == "tsv" else name
    elif form == "bom":
        text = b"\xef\xbb\xbf" + text.encode()
    elif form == "carriage returns":
        text = text.replace("\n", "\r\n")
    elif form == "quotes":
        text = "".join(",".join(f'"{cell}"' for cell in line.split(",")) + "\n" for line in text.splitlines())
    else:
        text = text.replace("\n", "\n\n") + "\n\n"
    train, evaluation = open_table(table(text, *ABCD, name=name))
    assert (files_of(train), files_of(evaluation), train.class_names) == (["a.jpg", "b.jpg"], ["c.jpg"], ["cat", "dog"])


def test_lines_are_those_of_the_file_where_quoted_cells_span_several(table, open_table, tmp_path):
    text = 'file,note,label\na.jpg,"two\nlines",x\n\nb.jpg,"a ""word"", and three\n\nlines",y\nc.jpg,,x\nd.jpg,-,y\n'
    train, evaluation = open_table(table(text, *ABCD))
    found = {source.name_of(i) for source in (train, evaluation) for i in range(len(source))}
    place = f"of {tmp_path}/labels.csv"
    lines = {"a": 2, "b": 5, "c": 8, "d": 9}
    assert found == {f"{tmp_path}/{file}.jpg (line {line} {place})" for file, line in lines.items()}


def test_a_parquet_table_gives_the_same_as_text_and_counts_rows(table, open_table, tmp_path):
    text = table(SPLIT, *ABCD)
    pq.write_table(pacsv.read_csv(text), tmp_path / "labels.parquet")
    for one, other in zip(open_table(text), open_table(str(tmp_path / "labels.parquet")), strict=True):
        assert one.places() == other.places() and one.labels().tolist() == other.labels().tolist()
        assert "(row " in other.name_of(0) and one.digest() == other.digest()


def test_integers_in_parquet_are_classes_and_other_numbers_are_asked_about(open_table, refused, table, tmp_path):
    table("", *ABCD)
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"file": list(ABCD), "label": [10, 2, None, 2]}), path)
    train, evaluation = open_table(path)
    assert train.class_names == ["2", "10"]
    pq.write_table(pa.table({"file": list(ABCD), "label": [10, 0.37, 1, 2]}), path)
    assert refused(path).startswith(f"row 2 of {path} has the label 0.37, which looks like a number to predict")
    numbers = {
        source.name_of(i).split()[0]: float(source.labels()[i, 0])
        for source in open_table(path, label_kind="number") for i in range(len(source))
    }  # fmt: skip
    assert list(dict(sorted(numbers.items())).values()) == pytest.approx([10, 0.37, 1, 2])


def test_files_are_relative_to_the_table_or_to_data_root_or_absolute(table, open_table, refused, tmp_path):
    listed = table(rows("file", "a.jpg", "./b.jpg", f"{tmp_path}/x/c.jpg"), "x/a.jpg", "x/b.jpg", "x/c.jpg")
    train, evaluation = open_table(listed, root=str(tmp_path / "x"))
    assert sorted(train.places() + evaluation.places()) == [f"{tmp_path}/x/{name}" for name in ABCD[:3]]
    told = refused(listed)
    assert f"2 of 3 files are not in {tmp_path}: a.jpg (line 2 of {listed}), b.jpg (line 3" in told
    assert "set data.root" in told


def test_many_files_of_a_folder_are_looked_for_in_its_list(table, open_table, refused):
    names = [f"deep/{number:03d}.jpg" for number in range(150)]
    assert sum(map(len, open_table(table(rows("file", *names), *names)))) == 150
    told = refused(table(rows("file", *names, "deep/lost.jpg", "gone/1.jpg")))
    assert (
        "2 of 152 files are not in" in told and "deep/lost.jpg (line 152 of" in told and "gone/1.jpg (line 153" in told
    )


def test_labels_may_be_several_columns_or_separated_or_numbers_or_missing(table, open_table):
    text = "path,tags,x,y\n" + rows(*(f"{file},red|round,{place},{place / 2}" for place, file in enumerate(ABCD)))
    path = table(text, *ABCD)
    train, _ = open_table(path, label_column="tags", label_separator="|")
    assert (train.label_kind, train.class_names, train.labels().tolist()[0]) == ("multi", ["red", "round"], [1, 1])
    train, evaluation = open_table(path, label_column=("x", "y"), label_kind="number")
    assert (train.label_kind, train.class_names) == ("number", ["x", "y"]) and evaluation.labels().shape == (1, 2)
    train, _ = open_table(path)
    assert train.class_names is None and train.labels().tolist() == [-1] * 3


def test_groups_lie_on_one_side_and_a_picture_without_a_group_is_one_by_itself(table, open_table):
    names = [f"{number}.jpg" for number in range(40)]
    lines = [f"{name},{'' if number < 20 else f'patient {number // 5}'}" for number, name in enumerate(names)]
    train, evaluation = open_table(table("file,group\n" + rows(*lines), *names), eval_fraction=0.3)
    sides = [
        {int(name[:-4]) // 5 for name in files_of(source) if int(name[:-4]) >= 20} for source in (train, evaluation)
    ]
    assert not sides[0] & sides[1] and abs(len(evaluation) - 12) <= 5
    assert len({int(name[:-4]) // 5 for name in files_of(evaluation) if int(name[:-4]) < 20}) > 1


def test_a_group_in_both_splits_is_named_with_both_lines_but_not_pictures_without_one(table, open_table, refused):
    lines = ["a.jpg,train,p1", "b.jpg,train,", "c.jpg,val,", "d.jpg,val,p1"]
    path = table("file,split,group\n" + rows(*lines), *ABCD)
    told = f"the group p1 is for training in line 2 of {path} and for evaluation in line 5 of {path}: put it into one"
    assert refused(path).startswith(told)
    assert len(open_table(table("file,split,group\n" + rows(*lines[:3]), *ABCD))[1]) == 1


def test_without_evaluation_rows_a_share_is_held_out_class_by_class_and_a_split_may_be_ignored(table, open_table):
    names = [f"{number}.jpg" for number in range(40)]
    lines = [f"{name},{'dog' if number < 10 else 'cat'},train" for number, name in enumerate(names)]
    path = table("file,label,split\n" + rows(*lines), *names)
    for settings in ({}, {"train_split": "", "eval_split": ""}):
        _, evaluation = open_table(path, eval_fraction=0.2, **settings)
        assert np.bincount(evaluation.labels()).tolist() == [6, 2]


def test_folds_are_splits_too_and_an_empty_train_split_means_all_others(table, open_table):
    names = [f"{number}.jpg" for number in range(6)]
    path = table("file,fold\n" + rows(*(f"{name},{number % 3}" for number, name in enumerate(names))), *names)
    train, evaluation = open_table(path, split_column="fold", train_split="", eval_split="1")
    assert (files_of(train), files_of(evaluation)) == (["0.jpg", "2.jpg", "3.jpg", "5.jpg"], ["1.jpg", "4.jpg"])
    train, evaluation = open_table(table(SPLIT, *ABCD), train_split="")
    assert files_of(train) == ["a.jpg", "b.jpg"]  # never those for a later test


def test_a_table_only_for_evaluation_can_be_measured(table, open_table, make_config):
    path = table(SPLIT.replace("train", "test").replace("val", "test"), *ABCD)
    with pytest.raises(NothingToTrainOn, match="no training pictures in labels.csv"):
        open_table(path)
    assert len(make_source(make_config(name="table", path=path), "eval", (8, 8), 3)) == 4


def test_pictures_without_a_label_or_split_and_classes_on_one_side_are_told(table, open_table, make_config):
    text = "file,label,split\na.jpg,cat,train\nb.jpg,,train\nc.jpg,cat,val\nd.jpg,dog,train\ne.jpg,dog,\n"
    path = table(text, *ABCD, "e.jpg")
    train, evaluation = open_table(path)
    assert train.labels().tolist() == [0, -1, 1]
    assert [*evaluation.notes] == [
        f"pictures without a split, which are not used: 1, the first in line 6 of {path}",
        f"pictures to learn from without a label: 1, the first in line 3 of {path}",
        "no pictures to evaluate on for 1 of 2 classes: dog",
    ]
    with pytest.raises(
        UserError, match=r"b.jpg \(line 3 of .*labels.csv\) has no label; 1 of 3 pictures have none: choose"
    ):
        Labelled(train, make_config())


def test_a_class_that_only_evaluation_has_is_refused(table, refused):
    told = refused(table(SPLIT.replace("dog,val", "elk,val"), *ABCD))
    assert (
        "have the class 'elk', which the training data in labels.csv train does not have: it has 'cat', 'dog'" in told
    )


@pytest.mark.parametrize("text, settings, told", [
    ("name,label\na.jpg,x\n", {}, "labels.csv: which of its columns (name, label) has the files? None is one of file "),
    ("file,path\na.jpg,a.jpg\n", {}, "labels.csv has the columns file and path: which is meant? Set data.image_column"),
    ("file,label,class\na.jpg,x,y\n", {}, "has the columns label and class: which is meant? Set data.label_column"),
    ("file\na.jpg\n", {"label_column": "kind"}, "data.label_column=kind: labels.csv has no such column; it has "),
    ("file\na.jpg\n", {"label_kind": "number"}, "data.label_kind=number, but which column of labels.csv"),
    ("file,file\na.jpg,b.jpg\n", {}, "labels.csv has several columns 'file': rename them"),
    ("file,label\na.jpg,x\nb.jpg,y,z\n", {}, "labels.csv has 3 cells, but the first line names 2 columns: correct it"),
    ('file,label\na.jpg,"x\n', {}, "labels.csv cannot be read: unexpected end of data: correct its quotes"),
    ('file,label\na.jpg,"x"y\n', {}, "labels.csv cannot be read: ',' expected after '\"': correct its quotes"),
    ("file,label\n", {}, "labels.csv has no rows below its first line"),
    ("", {}, "labels.csv has no rows below its first line"),
    (b"file,label\na.jpg,caf\xe9\n", {}, "labels.csv cannot be read: 'utf-8' codec can't decode byte 0xe9"),
    ("file,label\na.jpg,x\n ,y\n", {}, "the column file is empty in 1 of 2 rows: line 3 of "),
    ("file,label\na.jpg,x\na.jpg,x\n", {}, "names the file a.jpg of line 2 of TMP/labels.csv twice: remove one"),
    ("file,label\na.jpg,x\n./a.jpg,y\n", {}, "of line 2 of TMP/labels.csv with another label or in another split"),
    ("file,split\na.jpg,train\nb.jpg,val\na.jpg,val\n", {}, "line 4 of TMP/labels.csv names the file a.jpg of line 2 "),
    ("file,split\na.jpg,one\nb.jpg,two\n", {}, "its splits are one, two: set data.train_split and data.eval_split"),
    ("file,split\na.jpg,train\nb.jpg,val\n", {"eval_split": "dev"}, "data.eval_split=dev: labels.csv has no such"),
    ("file,split\na.jpg,train\nb.jpg,val\nc.jpg,eval\n", {}, "holds eval and val: which is meant? Set data.eval_"),
])  # fmt: skip
def test_a_table_that_cannot_be_used_is_refused_in_one_line(text, settings, told, table, refused, tmp_path):
    assert told.replace("TMP", str(tmp_path)) in refused(table(text, "a.jpg", "b.jpg", "c.jpg"), **settings)


def test_a_path_that_is_no_table_is_refused_and_tables_in_a_folder_are_named(table, refused, tmp_path):
    table(SPLIT, *ABCD)
    table(SPLIT, name="more.tsv")
    assert refused(str(tmp_path)).endswith(
        "is a folder, not a table, and it holds labels.csv, more.tsv: name one of them"
    )
    assert "its name must end in one of .csv .tsv" in refused(str(tmp_path / "a.jpg"))
    assert "No such file or directory" in refused(str(tmp_path / "lost.csv"))
    table("PAR1", name="cut.parquet")
    assert "cut.parquet cannot be read as parquet" in refused(str(tmp_path / "cut.parquet"))
    assert "data.path is not set" in refused(None)


def test_the_same_photographs_as_folder_and_table_give_the_same_batches_bit_for_bit(make_config, tmp_path):
    for number in range(24):
        file = tmp_path / ("cat", "dog", "elk")[number % 3] / f"{number:02d}.jpg"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(picture_bytes(number, file_format="JPEG"))
    names = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.jpg"))
    (tmp_path / "labels.csv").write_text("image_path,class\n" + rows(*(f"{n},{n.split('/')[0]}" for n in names)))
    found = []
    for settings in (dict(name="image_folder", path=str(tmp_path)), dict(name="table", path=f"{tmp_path}/labels.csv")):
        data = make_config(batch_size=8, **settings)
        source = make_source(data, "train", (8, 8), 3)
        iterator = make_train_batches(source, data, (8, 8), 3, start_step=0, share=(0, 1))
        found.append([next(iterator) for _ in range(4)])
        iterator.close()
    assert_same(*found)


def test_a_copy_for_a_reader_process_is_small_and_reads_the_same(table, open_table):
    names = [f"{number:06d}.jpg" for number in range(500)]
    train, _ = open_table(table("file,label\n" + rows(*names, ending=",x"), *names))
    copy = pickle.dumps(train)
    assert len(copy) < 60 * len(names) and pickle.loads(copy).name_of(7) == train.name_of(7)


def test_what_is_the_same_for_a_resumed_run_changes_with_any_row_for_training(table, open_table):
    names = [f"{number}.jpg" for number in range(6)]
    lines = [f"{name},{'train' if number < 4 else 'val'}" for number, name in enumerate(names)]
    train, _ = open_table(table("file,split\n" + rows(*lines), *names))
    same, _ = open_table(table("file,split\n" + rows(*lines[:5]), name="fewer.csv"))
    assert train.digest() == same.digest()
    for changed in (lines[1:], [*lines[1:4], lines[0], *lines[4:]], [lines[0].replace("train", "val"), *lines[1:]]):
        other, _ = open_table(table("file,split\n" + rows(*changed), name="changed.csv"))
        assert train.digest() != other.digest()
