"""Which rows of a table are measured, and what is told of those that a model has learned from, measured or resumed."""

import pytest
from ml_collections import ConfigDict

from configs import common
from mae_jax.data.sources import make_source
from mae_jax.evaluation.unseen import choose_pictures, find_training_pictures, keep_hold_out, take_pictures
from mae_jax.evaluation.unseen_rows import check_unchanged
from mae_jax.interop.workdirs import Weights
from mae_jax.runtime.errors import UserError

COUNT = 20


@pytest.fixture
def table(tmp_path):
    """Returns a function that writes a table of the same pictures, with what each row has besides -> its path."""
    for number in range(COUNT):
        (tmp_path / f"{number}.jpg").touch()

    def write(name, columns="label", of_row=lambda number: "cat dog".split()[number % 2], rows=range(COUNT)):
        lines = [f"file,{columns}", *(f"{number}.jpg,{of_row(number)}" for number in rows)]
        (tmp_path / name).write_text("\n".join(lines))
        return str(tmp_path / name)

    return write


def in_splits(*sizes):
    """Labels and splits of rows: so many for training, validation and test."""
    names = [name for name, size in zip(("train", "val", "test"), sizes, strict=True) for _ in range(size)]
    return "label,split", lambda number: f"{'cat dog'.split()[number % 2]},{names[number]}"


def data_of(path, **settings):
    return common.get_config().data.to_dict() | {"name": "table", "path": path} | settings


def trained_on(path, **settings):
    """What a checkpoint says of a run on this table."""
    data = data_of(path, **settings)
    train = make_source(ConfigDict(data), "train", (8, 8), 3)
    return {"data": data, "num_train_examples": len(train), "train_pictures": train.digest()}


def measured(data, trained, *given):
    """(number of pictures, note) of what is measured."""
    chosen, note = choose_pictures(data, trained, {"path", *given})
    return len(make_source(ConfigDict(data | chosen), "eval", (8, 8), 3)), note


def test_another_table_is_measured_whole_if_it_has_no_splits_and_else_in_its_evaluation_rows(table):
    trained = trained_on(table("own.csv", rows=range(10)))
    other = table("other.csv", rows=range(10, COUNT))
    assert measured(data_of(other), trained) == (10, "")
    assert measured(data_of(other, eval_fraction=0.2), trained, "eval_fraction") == (2, "")
    assert measured(data_of(other), {"data": {"name": None}}) == (10, "")  # a file of others
    assert measured(data_of(table("split.csv", *in_splits(12, 5, 3))), trained)[0] == 5
    with pytest.raises(UserError, match="data.path is not set"):
        measured(data_of(None), trained)


def test_of_the_table_that_it_was_trained_on_what_was_held_out_is_measured(table, tmp_path):
    path = table("own.csv")
    trained = trained_on(path, eval_fraction=0.3)
    assert measured(data_of(path), trained) == (6, "")
    (tmp_path / "own.csv").rename(tmp_path / "moved.csv")
    assert measured(data_of(str(tmp_path / "moved.csv")), trained) == (6, "")  # told by its rows


def test_the_test_split_of_its_own_table_is_measured_without_a_word_but_not_the_training_pictures(table):
    path = table("own.csv", *in_splits(12, 5, 3))
    trained = trained_on(path)
    assert measured(data_of(path), trained) == (5, "")
    assert measured(data_of(path, eval_split="test"), trained, "eval_split") == (3, "")
    count, note = measured(data_of(path, train_split="val", eval_split="train"), trained, "train_split", "eval_split")
    assert (count, note) == (12, "12 of the 12 pictures measured were used for training")


def test_pictures_of_another_table_that_it_has_learned_from_are_counted(table):
    trained = trained_on(table("own.csv", *in_splits(12, 5, 3)))
    note = measured(data_of(table("other.csv", rows=range(8, COUNT))), trained)[1]
    assert note == "4 of the 12 pictures measured were used for training"


def test_a_table_that_changed_or_is_gone_is_told(table, tmp_path):
    path = table("own.csv", *in_splits(12, 5, 3))
    trained = trained_on(path)
    table("own.csv", *in_splits(9, 8, 3))
    note = measured(data_of(path), trained)[1]
    assert note == f"{path} has changed since the training: make sure no picture measured was trained on"
    other = table("other.csv", rows=range(8))
    (tmp_path / "own.csv").unlink()
    assert "are not here: make sure data.path has none of them" in measured(data_of(other), trained)[1]


def test_a_run_goes_on_only_with_the_training_rows_that_it_began_with(table):
    path = table("own.csv", *in_splits(12, 5, 3))
    trained = trained_on(path)
    for sizes in ((12, 5, 3), (12, 3, 5)):
        table("own.csv", *in_splits(*sizes))
        check_unchanged("runs/x", trained, make_source(ConfigDict(data_of(path)), "train", (8, 8), 3))
    table("own.csv", *in_splits(11, 6, 3))
    told = "--workdir=runs/x: the 11 training pictures in own.csv train are not the 12 that the run began with"
    with pytest.raises(UserError, match=told):
        check_unchanged("runs/x", trained, make_source(ConfigDict(data_of(path)), "train", (8, 8), 3))
    check_unchanged("runs/x", {}, make_source(ConfigDict(data_of(path)), "train", (8, 8), 3))  # of an old version


def test_a_run_that_begins_with_weights_of_one_on_the_same_table_holds_out_what_that_did(table):
    path = table("own.csv")
    for own, expected in ((path, False), (table("other.csv"), True)):
        config = common.get_config()
        config.data.update(data_of(path))
        keep_hold_out(config, "runs/x", {"data": data_of(own, stratify=False)}, resumed=False)
        assert config.data.stratify == expected


def test_a_table_and_its_columns_are_taken_over_and_another_table_has_splits_of_its_own(table):
    own = data_of("own.csv", label_column="kind", label_kind="number", eval_fraction=0.3)
    for given, path, fraction in (((), "own.csv", 0.3), (("data.path",), "other.csv", 0.1)):
        config = common.get_config()
        config.data.update({"name": None, "path": path})
        config.given, config.init_from = given, "runs/mine"
        take_pictures(config, {"data": own})
        data = config.data
        assert (data.path, data.label_column, data.label_kind, data.eval_fraction) == (path, "kind", "number", fraction)


def test_pictures_to_learn_from_are_those_of_the_table_that_it_was_trained_on(table):
    config, own = common.get_config(), table("own.csv", *in_splits(12, 5, 3))
    config.data = ConfigDict(data_of(table("other.csv", rows=range(17, COUNT)), eval_fraction=1.0))
    weights = Weights({"data": data_of(own), "class_names": None}, {}, 0, "")
    train, evaluation = find_training_pictures(weights, config, make_source(config.data, "eval", (8, 8), 3))
    assert (len(train), len(evaluation)) == (12, 3) and evaluation.class_names == train.class_names == ["cat", "dog"]
