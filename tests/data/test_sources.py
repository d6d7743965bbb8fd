"""The sources that need no files: digits and synthetic pictures."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from mae_jax.data.sources import SOURCES, Digits, count_images, make_source, make_sources, random_subset
from mae_jax.runtime.errors import UserError


def arrays(source) -> tuple[np.ndarray, np.ndarray]:
    records = [source[i] for i in range(len(source))]
    return np.stack([record["image"] for record in records]), np.asarray([record["label"] for record in records])


def test_the_digits_splits_part_scikit_learns_pictures_into_four_fifths_and_one_fifth_of_each_class(make_config):
    config = make_config(name="digits")
    parts = [arrays(make_source(config, split, (8, 8), 1)) for split in ("train", "eval")]
    assert [len(labels) for _, labels in parts] == [1437, 360]
    digits = load_digits()
    expected = sorted((*np.floor(image.ravel() * 255 / 16 + 0.5), label) for image, label in
                      zip(digits.images, digits.target, strict=True))  # fmt: skip
    found = sorted((*image.ravel().astype(float), label) for images, labels in parts
                   for image, label in zip(images, labels, strict=True))  # fmt: skip
    # Grey levels 0..16 become 0..255; 8 / 16 lies half-way between 127 and 128.
    np.testing.assert_allclose(found, expected, atol=1)
    for label in range(10):
        of_class = [(labels == label).sum() for _, labels in parts]
        assert of_class[1] / sum(of_class) == pytest.approx(0.2, abs=0.01)


def test_digits_are_grey_uint8_with_their_names(make_config):
    source = make_source(make_config(name="digits"), "train", (8, 8), 1)
    images, _ = arrays(source)
    assert images.shape == (1437, 8, 8, 1) and images.dtype == np.uint8 and images.max() == 255
    assert source.num_classes == 10 and source.class_names[7] == "7"


@pytest.mark.parametrize("name", ["digits", "synthetic"])
@pytest.mark.parametrize("split", ["train", "eval"])
def test_all_labels_are_those_of_the_pictures_one_by_one(make_config, name, split):
    source = make_source(make_config(name=name), split, (8, 8), 1)
    found = source.labels()
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, arrays(source)[1])


def test_a_number_of_images_is_told_with_their_split_also_of_a_part(make_config):
    train, evaluation = (make_source(make_config(name="digits"), split, (8, 8), 1) for split in ("train", "eval"))
    assert count_images(train, random_subset(evaluation, 1)) == (
        "1,437 training images in digits train, 1 evaluation image in digits eval"
    )
    assert count_images(None, evaluation) == "360 evaluation images in digits eval"


@pytest.mark.parametrize("size, channels", [((8, 8), 1), ((32, 48), 3), ((16, 16), 13)])
def test_synthetic_pictures_have_the_size_and_channels_asked_for(make_config, size, channels):
    source = make_source(make_config(name="synthetic"), "train", size, channels)
    assert source[3]["image"].shape == (*size, channels) and source[3]["image"].dtype == np.uint8
    assert len(source) == 1024
    assert len(make_source(make_config(name="synthetic"), "eval", size, channels)) == 256


def test_synthetic_pictures_follow_from_their_index_and_differ_between_indices_and_splits(make_config):
    config = make_config(name="synthetic")
    train, again, evaluation = (make_source(config, split, (16, 16), 3) for split in ("train", "train", "eval"))
    np.testing.assert_array_equal(train[5]["image"], again[5]["image"])
    assert not np.array_equal(train[5]["image"], train[15]["image"])
    assert not np.array_equal(train[5]["image"], evaluation[5]["image"])


def test_synthetic_labels_can_be_learnt_and_chance_is_a_tenth(make_config):
    config = make_config(name="synthetic", num_examples=400)
    sets = [arrays(make_source(config, split, (16, 16), 1)) for split in ("train", "eval")]
    # The power spectrum forgets the phase of a grating and keeps its orientation.
    spectra = [np.abs(np.fft.fft2(images[..., 0] / 255.0)).reshape(len(images), -1) for images, _ in sets]
    model = RidgeClassifier().fit(spectra[0], sets[0][1])
    assert model.score(spectra[1], sets[1][1]) > 0.9


def test_too_few_synthetic_pictures_are_refused(make_config):
    with pytest.raises(UserError, match="data.num_examples=3 is too few"):
        make_source(make_config(name="synthetic", num_examples=3), "train", (8, 8), 1)


EXAMPLE = Path(__file__).parents[2] / "docs" / "extending.md"


def test_a_source_of_ones_own_needs_length_and_pictures_and_is_named_by_its_module(make_config, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(# my_pictures.py\n.*?)```", EXAMPLE.read_text(), re.DOTALL)
    (tmp_path / "my_pictures.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    train, evaluation = make_sources(make_config(name="my_pictures:Stripes"), (8, 8), 1)
    assert (len(train), len(evaluation), train.num_classes) == (800, 200, 2)
    assert evaluation.labels().tolist() == [0, 1] * 100 and evaluation.labels().dtype == np.int64
    assert train.name_of(3) == "#3" and pickle.loads(pickle.dumps(train))[3]["label"] == 1
    with pytest.raises(UserError, match="data.name=my_pictures:Spots cannot be imported: .*Spots"):
        make_source(make_config(name="my_pictures:Spots"), "train", (8, 8), 1)


def test_labels_are_matched_by_the_names_of_their_classes(make_config, monkeypatch):
    class Reordered(Digits):
        def __init__(self, split, *others):
            super().__init__(split)
            self.class_names = [str(label) for label in (range(10) if split == "train" else range(9, -1, -1))]

    monkeypatch.setitem(SOURCES, "reordered", Reordered)
    _, evaluation = make_sources(make_config(name="reordered"), (8, 8), 1)
    assert evaluation.class_names == [str(label) for label in range(10)]
    np.testing.assert_array_equal(evaluation.labels(), 9 - Digits("eval").labels())
