"""What the cells of tables mean as labels, and which cells are refused, with their place."""

import numpy as np
import pytest
from sklearn.preprocessing import LabelEncoder, MultiLabelBinarizer

from mae_jax.data.labels import encode_labels, kind_of
from mae_jax.runtime.errors import UserError


@pytest.fixture
def encode(make_config):
    """Returns a function: columns, perhaps with a schema and known classes, by settings -> labels."""

    def make(columns, schema=None, known=None, **settings):
        columns = columns if isinstance(columns, dict) else {"label": columns}
        data = make_config(**settings)
        kind = kind_of(data, columns)
        return encode_labels(columns, kind, data, lambda row: f"line {row + 2} of t.csv", schema, known)

    return make


def refused(encode, *columns, **settings) -> str:
    with pytest.raises(UserError) as error:
        encode(*columns, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_words_are_classes_in_the_order_of_their_text(encode):
    cells = ["dog", "cat", "ant", "cat", " dog "]
    kind, names, values = encode(cells)
    reference = LabelEncoder().fit([cell.strip() for cell in cells])
    assert kind == "class" and names == reference.classes_.tolist() and values.dtype == np.int64
    assert values.tolist() == reference.transform([cell.strip() for cell in cells]).tolist()


@pytest.mark.parametrize("cells, names", [
    (["10", "2", "1", "2"], ["1", "2", "10"]),
    ([10, 2, 1, 2], ["1", "2", "10"]),
    ([10.0, None, 1.0, float("nan")], ["1", "10"]),  # integers that pandas made floats of, for an empty cell
    (["10.0", "", "2.0"], ["2.0", "10.0"]),
    (["-1", "+1", "--1"], ["+1", "--1", "-1"]),
    (["10", "2", "b"], ["10", "2", "b"]),
    ([True, False], ["False", "True"]),
])  # fmt: skip
def test_whole_numbers_are_classes_in_their_order_but_among_words_text(encode, cells, names):
    assert encode(cells).class_names == names


def test_a_cell_without_content_is_no_label_of_each_kind(encode):
    assert encode(["a", "", None, "  ", float("nan")]).values.tolist() == [0, -1, -1, -1, -1]
    np.testing.assert_array_equal(encode(["1.5", "", None], label_kind="number").values, [[1.5], [np.nan], [np.nan]])
    for several in (encode(["b|a", "", None], label_separator="|"), encode([["a", "b"], [None], None])):
        np.testing.assert_array_equal(several.values, [[1, 1], [np.nan, np.nan], [np.nan, np.nan]])
    assert encode(["", ""]).class_names is None


def test_several_labels_between_separators_or_in_lists_are_flags_of_their_classes(encode):
    lists = [["b", "a"], ["c"], ["a", "c", "a"]]
    reference = MultiLabelBinarizer()
    flags = reference.fit_transform(lists)
    for cells, settings in ((lists, {}), ([" ; ".join(cell) for cell in lists], {"label_separator": ";"})):
        kind, names, values = encode(cells, **settings)
        assert kind == "multi" and names == reference.classes_.tolist() and values.dtype == np.float32
        np.testing.assert_array_equal(values, flags)


@pytest.mark.parametrize("cells, settings", [(["a|b", "|"], {"label_separator": "|"}), ([["a", "b"], []], {})])
def test_an_empty_list_or_a_separator_alone_says_that_no_class_applies(encode, cells, settings):
    assert encode(cells, **settings).values.tolist() == [[1, 1], [0, 0]]


def test_one_label_a_picture_may_be_asked_for_as_one_of_several(encode):
    assert encode(["a", "b"], label_kind="multi").values.tolist() == [[1, 0], [0, 1]]


def test_a_column_a_class_is_read_as_flags_in_the_usual_words(encode):
    kind, names, values = encode({"wings": ["1", "no", "TRUE"], "horns": ["0.0", 1, 1.0], "fur": [True, False, None]})
    assert (kind, names) == ("multi", ["wings", "horns", "fur"])
    np.testing.assert_array_equal(values, [[1, 0, 1], [0, 1, 0], [1, 1, np.nan]])
    told = refused(encode, {"wings": ["1", "2"], "horns": ["0", "0"]})
    assert told.startswith("line 3 of t.csv: wings is '2', but") and "data.label_kind=number" in told


def test_numbers_are_float32_one_a_column(encode):
    kind, names, values = encode({"x": ["1.5", "-2e3"], "y": [3, 0.1]}, label_kind="number")
    assert (kind, names, values.dtype) == ("number", ["x", "y"], np.float32)
    np.testing.assert_array_equal(values, np.float32([[1.5, 3], [-2000, 0.1]]))


@pytest.mark.parametrize("cell", ["high", "nan", "inf", "-inf", "1e39", "1,5", float("inf")])
def test_a_cell_that_is_no_finite_number_is_named_with_its_line(encode, cell):
    told = refused(encode, {"depth": ["1", "2", cell]}, label_kind="number")
    assert told == f"line 4 of t.csv: depth is {str(cell)!r}, not a finite number: correct it, or leave it empty"


@pytest.mark.parametrize("cells, line", [(["1", "0.37"], 3), ([2, 0.5], 3), (["1", "", "nan"], 4), (["1e9"], 2)])
def test_numbers_that_are_not_whole_are_not_taken_for_classes_unless_one_says_so(encode, cells, line):
    told = refused(encode, cells)
    assert told.startswith(f"line {line} of t.csv has the label ") and "set data.label_kind=number" in told
    assert encode(cells, label_kind="class").kind == "class"
    assert encode([*cells, "b"]).kind == "class"  # among words


def test_places_in_a_schema_become_its_names_whether_used_or_not(encode):
    found = encode([2, 0, -1, None], schema=["dog", "cat", "ant"])
    assert found.class_names == ["dog", "cat", "ant"] and found.values.tolist() == [2, 0, -1, -1]
    np.testing.assert_array_equal(encode([[1, 0], [2]], schema=["dog", "cat", "ant"]).values, [[1, 1, 0], [0, 0, 1]])
    assert refused(encode, [0, 3], ["dog", "cat"]) == "line 3 of t.csv has the label 3, but there are 2 classes"


def test_known_classes_keep_their_places_and_others_follow(encode):
    found = encode(["b", "x", "a"], known=["b", "a", "c"])
    assert found.class_names == ["b", "a", "c", "x"] and found.values.tolist() == [0, 3, 1]


@pytest.mark.parametrize("columns, settings, told", [
    (["a|b"], dict(label_kind="class", label_separator="|"), "data.label_separator='|' give a picture several labels"),
    ({"a": ["1"], "b": ["0"]}, dict(label_kind="class"), "2 columns give a picture several labels"),
    ([["a"], ["b"]], dict(label_kind="class"), "the lists in the column label give a picture several labels"),
    ([[1.0]], dict(label_kind="number"), "but the column label holds lists"),
    (["1|2"], dict(label_kind="number", label_separator="|"), "but data.label_separator='|' is set"),
    ({"a": [[1]], "b": [[0]]}, {}, "a holds lists: name it alone"),
    ([{"x": 1}], {}, "the column label holds structs, not labels: set data.label_column"),
])  # fmt: skip
def test_settings_that_contradict_the_cells_are_named(encode, columns, settings, told):
    assert told in refused(encode, columns, **settings)
