"""TFDS data sets: a tiny prepared one is written and read without TensorFlow, and mistakes name their remedy."""

import json
import pickle

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from mae_jax.data import tfds_source
from mae_jax.data.sources import make_source
from mae_jax.runtime.errors import UserError
from tests.data.conftest import decode, picture_bytes

FEATURES = "tensorflow_datasets.core.features."
IMAGE = {
    "pythonClassName": FEATURES + "image_feature.Image",
    "image": {"dtype": "uint8", "encodingFormat": "png", "shape": {"dimensions": ["-1", "-1", "3"]}},
}
LABEL = {"pythonClassName": FEATURES + "class_label_feature.ClassLabel", "classLabel": {"numClasses": "3"}}
ARRAY = {
    "pythonClassName": FEATURES + "tensor_feature.Tensor",
    "tensor": {"shape": {"dimensions": ["4", "5", "13"]}, "dtype": "float32", "encoding": "none"},
}
TEXT = {"pythonClassName": FEATURES + "text_feature.Text", "text": {}}


def prepare(folder, features, splits, file_format="array_record", supervised=None):
    """Writes the data set "tiny" 1.0.0 as TFDS's own `download_and_prepare` lays it out; picture i has label i % 3."""
    version = folder / "tiny" / "1.0.0"
    version.mkdir(parents=True)
    for split, count in splits.items():
        writer = ArrayRecordWriter(f"{version}/tiny-{split}.{file_format}-00000-of-00001", "group_size:1")
        for i in range(count):
            example = tf_example_pb2.Example()
            for name, feature in features.items():
                value = example.features.feature[name]
                if feature is IMAGE:
                    value.bytes_list.CopyFrom(tf_feature_pb2.BytesList(value=[picture_bytes(i)]))
                elif feature is ARRAY:
                    values = np.arange(i, i + 4 * 5 * 13, dtype=np.float32)
                    value.float_list.CopyFrom(tf_feature_pb2.FloatList(value=values))
                elif "classLabel" in feature:
                    value.int64_list.CopyFrom(tf_feature_pb2.Int64List(value=[i % 3]))
                else:
                    value.bytes_list.CopyFrom(tf_feature_pb2.BytesList(value=[b"text"]))
            writer.write(example.SerializeToString())
        writer.close()
    info = {
        "name": "tiny",
        "version": "1.0.0",
        "fileFormat": file_format,
        "splits": [
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(count)],
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
            for split, count in splits.items()
        ],
    }
    if supervised:
        info["supervisedKeys"] = {"tuple": {"items": [{"featureKey": key} for key in supervised]}}
    (version / "dataset_info.json").write_text(json.dumps(info))
    tree = {"pythonClassName": FEATURES + "features_dict.FeaturesDict", "featuresDict": {"features": features}}
    (version / "features.json").write_text(json.dumps(tree))
    for name, feature in features.items():
        if feature is LABEL:
            (version / f"{name}.labels.txt").write_text("ant\nbee\ncat\n")


@pytest.fixture
def open_tiny(make_config, tmp_path):
    def open_split(split="train", **settings):
        settings = {"name": "tiny", "path": str(tmp_path), **settings}
        return make_source(make_config(**settings), split, (8, 8), 3)

    return open_split


def test_pictures_stay_encoded_and_labels_have_names(tmp_path, open_tiny):
    prepare(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": 7, "validation": 4})
    train, evaluation = open_tiny(), open_tiny("eval")
    assert (len(train), len(evaluation)) == (7, 4)
    assert (train.num_classes, train.class_names) == (3, ["ant", "bee", "cat"])
    assert [train[i]["label"] for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert train[4]["image"] == picture_bytes(4)
    assert decode(train[4]["image"], 3, 10**6).shape == (20, 24, 3)
    assert evaluation.name_of(2) == "tiny validation #2"


def test_a_slice_of_a_split_can_be_read(tmp_path, open_tiny):
    prepare(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": 10})
    evaluation = open_tiny("eval", eval_split="train[80%:]")
    assert len(evaluation) == 2 and evaluation[0]["image"] == picture_bytes(8)
    assert evaluation.place == "in tiny train[80%:]"


def test_features_are_found_by_their_type_whatever_their_names(tmp_path, open_tiny):
    prepare(tmp_path, {"caption": TEXT, "photo": IMAGE, "species": LABEL}, {"train": 4})
    source = open_tiny()
    assert source[1] == {"image": picture_bytes(1), "label": 1}


def test_arrays_of_bands_are_the_pictures_of_a_data_set_that_has_no_others(tmp_path, open_tiny):
    prepare(tmp_path, {"sentinel2": ARRAY, "label": LABEL}, {"train": 4})
    source = open_tiny()
    assert (source.picture_size, source.num_classes, source[2]["label"]) == ((4, 5), 3, 2)
    found = decode(source[2]["image"], 13, 10**6)
    np.testing.assert_array_equal(found, np.arange(2, 262, dtype=np.float32).reshape(4, 5, 13))


def test_a_data_set_without_labels_is_unlabelled(tmp_path, open_tiny):
    prepare(tmp_path, {"caption": TEXT, "image": IMAGE}, {"train": 4})
    source = open_tiny()
    assert (source.num_classes, source.class_names, source[1]["label"]) == (0, None, -1)


def test_among_several_labels_tfdss_own_choice_counts_and_then_the_name_label(tmp_path, open_tiny):
    # The features come in the order of their names, so "breed" is the first; it has other class names.
    other = {**LABEL, "classLabel": {"numClasses": "9"}}
    features = {"breed": other, "image": IMAGE, "label": LABEL}
    prepare(tmp_path / "a", features, {"train": 1})
    assert open_tiny(path=str(tmp_path / "a")).num_classes == 3
    prepare(tmp_path / "b", features, {"train": 1}, supervised=("image", "breed"))
    assert open_tiny(path=str(tmp_path / "b")).num_classes == 9


def test_all_labels_are_read_without_decoding_a_picture(tmp_path, open_tiny, monkeypatch):
    prepare(tmp_path / "a", {"image": IMAGE, "label": LABEL}, {"train": 11})
    prepare(tmp_path / "b", {"image": IMAGE}, {"train": 4})
    monkeypatch.setattr(tfds_source, "_LABELS_AT_ONCE", 4)
    monkeypatch.setattr(Image, "open", None)
    labelled, unlabelled = (open_tiny(path=str(tmp_path / name)) for name in "ab")
    assert labelled.labels().tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1] and labelled.labels().dtype == np.int64
    assert unlabelled.labels().tolist() == [-1] * 4


def test_a_source_can_be_pickled(tmp_path, open_tiny):
    prepare(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": 4})
    source = open_tiny()
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_data_without_pictures_are_refused(tmp_path, open_tiny):
    prepare(tmp_path, {"caption": TEXT}, {"train": 2})
    with pytest.raises(UserError, match="data.name=tiny: it has no images, only caption"):
        open_tiny()


def test_an_unknown_split_lists_those_that_exist(tmp_path, open_tiny):
    prepare(tmp_path, {"image": IMAGE}, {"train": 2, "test": 1})
    with pytest.raises(UserError, match="data.eval_split=validation: tiny has no such split.*there are test, train"):
        open_tiny("eval")


def test_data_prepared_as_tfrecord_name_the_command_that_converts_them(tmp_path, open_tiny):
    prepare(tmp_path, {"image": IMAGE}, {"train": 2}, file_format="tfrecord")
    command = f"tfds convert_format --dataset_version_dir={tmp_path}/tiny/1.0.0 --out_file_format=array_record"
    with pytest.raises(UserError, match="as tfrecord, .*") as error:
        open_tiny()
    assert command in str(error.value)


@pytest.mark.parametrize(
    "name, extra", [("cifar10", ""), ("imagenet2012:5.1.0", " --manual_dir=FOLDER_OF_THE_ARCHIVES")]
)
def test_data_that_are_not_prepared_name_the_command_that_does_it(tmp_path, open_tiny, name, extra):
    command = f"pip install tensorflow && tfds build {name} --data_dir={tmp_path}{extra} --file_format=array_record"
    with pytest.raises(UserError, match="is not prepared in") as error:
        open_tiny(name=name)
    assert command in str(error.value)
    assert "for a folder of pictures, set data.name=image_folder" in str(error.value)  # what fine-tuning may have meant


@pytest.mark.parametrize("name, near", [("cifar1o", "cifar10"), ("didgits", "digits"), ("imagefolder", "image_folder")])
def test_an_unknown_name_gets_the_nearest_known_one(open_tiny, name, near):
    with pytest.raises(UserError, match=f"data.name={name}: not one of .* or a TFDS data set; did you mean .{near}"):
        open_tiny(name=name)


def test_an_unknown_version_is_the_users_mistake(open_tiny):
    with pytest.raises(UserError, match="data.name=cifar10:9.9.9: TFDS cannot open it: .*only: 3.0.2"):
        open_tiny(name="cifar10:9.9.9")


def test_reading_neither_needs_nor_loads_tensorflow(tmp_path, open_tiny):
    import sys

    prepare(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": 4})
    assert np.asarray(decode(open_tiny()[0]["image"], 3, 10**6)).any()
    assert "tensorflow" not in sys.modules
