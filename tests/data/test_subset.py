"""Parts of a source, and labels that can be relied on."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_jax.data.image_folder import PictureFiles
from mae_jax.data.loader import make_train_batches
from mae_jax.data.sources import Labelled, MatchedClasses, Source, make_source, random_subset, stratified_subset
from mae_jax.runtime.errors import UserError


class Pictures(Source):
    """Pictures in memory with the labels given; each shows its index."""

    label_kind, in_memory, class_names, picture_size = "class", True, ["cat", "ant"], (8, 8)
    place, notes = "in a drawer", ["some are upside down"]

    def __init__(self, labels, num_classes: int):
        self._labels, self.num_classes = list(labels), num_classes

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        return {"image": np.full((8, 8, 3), index, np.uint8), "label": self._labels[index]}

    def labels(self):
        return np.asarray(self._labels, np.int64)

    def name_of(self, index):
        return f"picture {index}"


def indices_of(subset) -> list[int]:
    """Where the examples of a subset of `Pictures` lie in it."""
    indices = [int(subset[i]["image"][0, 0, 0]) for i in range(len(subset))]
    assert [subset.name_of(i) for i in range(len(subset))] == [f"picture {index}" for index in indices]
    return indices


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.001, 1.0), st.integers(0, 2**32))
def test_a_stratified_subset_has_the_share_of_each_class_but_at_least_one(labels, fraction, seed):
    source = Pictures(labels, 5)
    subset = stratified_subset(source, fraction, seed)
    indices = indices_of(subset)
    assert indices == sorted(set(indices))  # the source's order, each once
    found = subset.labels()
    assert found.tolist() == [labels[i] for i in indices] == [subset[i]["label"] for i in range(len(subset))]
    for label in range(5):
        count = labels.count(label)
        kept = int((found == label).sum())
        assert kept == (max(1, round(fraction * count)) if count else 0)
    assert indices_of(stratified_subset(source, fraction, seed)) == indices
    if fraction == 1:
        assert indices == list(range(len(labels)))


def test_a_stratified_subset_is_random_and_the_seed_decides_it():
    source = Pictures(np.arange(200) % 2, 2)
    chosen = [indices_of(stratified_subset(source, 0.1, seed)) for seed in range(200)]
    assert all(len(indices) == 20 for indices in chosen) and chosen[0] != chosen[1]
    counts = np.bincount(np.concatenate(chosen), minlength=200)  # each picture: 200 times with probability 0.1
    assert np.abs(counts - 20).max() < 5 * np.sqrt(18)


def test_a_stratified_subset_of_pictures_without_labels_is_refused():
    with pytest.raises(UserError, match="data.label_fraction=0.1, .* have no labels: leave it unset"):
        stratified_subset(Pictures([-1] * 10, 0), 0.1)


def test_a_random_subset_passes_labels_on():
    subset = random_subset(Pictures(np.arange(50) % 7, 7), 20)
    assert subset.labels().tolist() == [index % 7 for index in indices_of(subset)] and len(subset) == 20


def test_picture_files_have_no_labels(tmp_path, write_pictures):
    write_pictures(tmp_path, "1.png", "2.png")
    assert PictureFiles(tmp_path).labels().tolist() == [-1, -1]


def test_a_labelled_source_is_its_source(make_config):
    source = make_source(make_config(name="digits"), "train", (8, 8), 1)
    labelled = Labelled(source, make_config(name="digits"))
    assert len(labelled) == len(source) and labelled.name_of(3) == source.name_of(3)
    offered = (labelled.num_classes, labelled.class_names, labelled.in_memory, labelled.picture_size)
    assert offered == (10, source.class_names, True, (8, 8))
    np.testing.assert_array_equal(labelled[3]["image"], source[3]["image"])
    np.testing.assert_array_equal(labelled.labels(), source.labels())


@pytest.mark.parametrize("wrap", [
    lambda source, config: Labelled(source, config), lambda source, config: random_subset(source, 3),
    lambda source, config: stratified_subset(source, 0.5),
    lambda source, config: MatchedClasses(source, ["ant", "cat"]),
])  # fmt: skip
def test_wrapped_sources_can_be_pickled(make_config, wrap):
    source = wrap(Pictures([0, 1, 1, 0, 1], 2), make_config(name="digits"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.labels().tolist() == source.labels().tolist() and copy[2]["label"] == source[2]["label"]
    assert copy.in_memory and copy.picture_size == (8, 8)
    assert (copy.place, copy.notes) == ("in a drawer", ["some are upside down"])


def test_every_source_says_what_it_offers(tmp_path, make_config, write_pictures):
    write_pictures(tmp_path, *(f"{i}.png" for i in range(4)))
    folder = make_config(name="image_folder", path=str(tmp_path))
    synthetic = make_config(name="synthetic", num_examples=8)
    sources = [make_source(config, "train", (12, 8), 3) for config in (folder, synthetic)]
    for source, picture_size in zip((*sources, PictureFiles(tmp_path)), (None, (12, 8), None), strict=True):
        assert (source.in_memory, source.picture_size) == (False, picture_size)
        assert isinstance(source, Source)


def test_pictures_in_a_flat_folder_are_refused_and_told_to_lie_in_class_folders(tmp_path, make_config, write_pictures):
    write_pictures(tmp_path, *(f"{i}.png" for i in range(5)))
    config = make_config(name="image_folder", path=str(tmp_path))
    with pytest.raises(UserError, match="png, have no labels: .* into a folder of its own") as error:
        Labelled(make_source(config, "train", (8, 8), 3), config)
    assert f"data.path={tmp_path}: " in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("num_classes, message", [(0, "have no labels"), (1, "are all of one class")])
def test_data_without_two_classes_are_refused(make_config, num_classes, message):
    with pytest.raises(UserError, match=f"data.name=stl10, .*{message}: choose labelled data"):
        Labelled(Pictures([0] * 4, num_classes), make_config(name="stl10"))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_the_classes_names_the_picture_once(make_config, label):
    config = make_config(batch_size=4, crop_scale=(1.0, 1.0))
    source = Labelled(Pictures([0, 1, label, 2], 3), config)
    assert source[1]["label"] == 1
    with pytest.raises(UserError, match=rf"^picture 2 has the label {label}, which is outside \[0, 3\)"):
        source[2]
    with pytest.raises(UserError, match=rf"^picture 2 has the label {label}"):
        next(make_train_batches(source, config, (8, 8), 3))
