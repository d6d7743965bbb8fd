"""The type of a run's pictures, and what its values mean, are settled before anything is trained."""

import re

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.augment import unit_range
from mae_jax.data.decoding import open_picture
from mae_jax.data.depth import settle_depth
from mae_jax.data.device_batches import training_batches
from mae_jax.data.loader import make_train_batches
from mae_jax.data.resolutions import Stage
from mae_jax.data.sources import make_sources
from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import check_channels
from tests.data.conftest import picture_bytes
from tests.meshes import device_mesh

RNG = np.random.default_rng(0)


class Arrays:
    """A source of arrays, or of encoded pictures."""

    label_kind, num_classes, class_names, in_memory, picture_size = "class", 0, None, True, None

    def __init__(self, *images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if self.images[index] is None:
            raise OSError(5, "Input/output error")
        return {"image": self.images[index], "label": -1}

    def name_of(self, index):
        return f"picture {index}"


def pictures(dtype, count=20, channels=3, low=0, high=200):
    return [RNG.integers(low, high, (6, 9, channels)).astype(dtype) for _ in range(count)]


def settled(data, *images, channels=3) -> str:
    settle_depth(data, (Arrays(*images),), channels)
    return data.dtype


@pytest.mark.parametrize("own, dtype", [
    ("bool", "uint8"), ("uint8", "uint8"), ("uint16", "uint16"), ("int8", "int16"), ("int16", "int16"),
    ("float16", "float16"), ("float32", "float32"), ("float64", "float32"), ("int32", "float32"), ("uint32", "float32"),
    ("int64", "float32"),
])  # fmt: skip
def test_the_first_readable_picture_decides_the_type(make_config, own, dtype):
    broken = b"\x93NUMPY nothing more"
    data = make_config(value_range=None if own in ("uint8", "bool") else (0, 100))
    assert settled(data, None, broken, *pictures(own, high=100)) == dtype


def test_a_damaged_photograph_is_left_to_the_loader_whatever_the_type(make_config):
    whole = picture_bytes(0, 200, 240, "JPEG")
    assert settled(make_config(dtype="float32", value_range=(0, 255)), whole[: len(whole) // 2], whole) == "float32"


def test_a_type_that_is_given_is_kept_if_it_holds_the_pictures(make_config):
    for own in ("uint8", "uint16", "float64"):
        assert settled(make_config(dtype="float32", value_range=(0, 1)), *pictures(own)) == "float32"
    with pytest.raises(UserError, match="picture 0: uint16 among uint8 pictures: set data.dtype=uint16"):
        settled(make_config(dtype="uint8"), *pictures("uint16"))


def test_pictures_of_several_types_are_told_apart_before_training_with_the_type_that_holds_both(make_config):
    mixed = [*pictures("uint8", 10), *pictures("int16", 10)]
    for images in (mixed, mixed[::-1]):
        with pytest.raises(UserError, match=r"picture 0 is \w+, but picture 1\d \w+: .* set data.dtype=int16, which"):
            settled(make_config(value_range=(0, 9)), *images)
        assert settled(make_config(value_range=(0, 9), dtype="int16"), *images) == "int16"


def test_pictures_of_several_numbers_of_bands_are_told_apart_before_training(make_config):
    images = [*pictures("uint16", 10, 13), *pictures("uint16", 10, 12)]
    with pytest.raises(UserError, match=r"picture 1\d: an array \[6, 9, 12\] has 12 channels, but model.channels=13"):
        settled(make_config(value_range=(0, 9)), *images, channels=13)
    assert settled(make_config(value_range=(0, 9), bands=(11, 0)), *images, channels=2) == "uint16"
    with pytest.raises(UserError, match=r"picture 1\d: 12 channels, too few for data.bands=\(12, 0\)"):
        settled(make_config(value_range=(0, 9), bands=(12, 0)), *images, channels=2)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_deep_values_need_a_range_or_a_mean_and_std_of_their_own(make_config, dtype):
    images = pictures(dtype, low=3, high=4000)
    images[0][0, 0] = 3
    said = (
        f"picture 0: {dtype} pictures with values from 3 to 3[0-9]*, and nothing says which are black and white: set "
    )
    with pytest.raises(UserError, match=said + r"data.value_range=\(low, high\), or .*configs/inspect.py"):
        settled(make_config(), *images)
    with pytest.raises(UserError, match="nothing says"):
        settled(make_config(mean=(2000.0,)), *images)
    with pytest.raises(UserError, match=re.escape("data.mean=(0.5,) and data.std=(0.25,) are not of such values")):
        settled(make_config(mean=(0.5,), std=(0.25,)), *images)
    for enough in ({"value_range": (0, 4095)}, {"mean": (2000.0,), "std": (1200.0,)}):
        assert settled(make_config(**enough), *images) == dtype


def test_8_bit_files_that_are_to_be_deep_need_a_range_too(make_config):
    with pytest.raises(UserError, match="float32 pictures with values from .*, and nothing says"):
        settled(make_config(dtype="float32"), picture_bytes(0, file_format="JPEG"))
    assert settled(make_config(dtype="float32", value_range=(0, 255)), picture_bytes(0)) == "float32"


def test_pictures_without_any_data_say_nothing_of_their_values(make_config):
    empty = np.full((6, 9, 3), np.nan, np.float32)
    assert settled(make_config(), empty, empty) == "float32"
    with pytest.raises(UserError, match="values from 5 to 5"):
        settled(make_config(), empty, np.where(np.arange(3) < 1, np.float32(5), empty))


def test_mean_and_std_of_8_bit_pictures_or_of_a_range_lie_between_0_and_1(make_config):
    for changed in ({"mean": (123.7,)}, {"std": (58.4,)}):
        (key,) = changed
        data = make_config(**changed)
        check_channels(data, 3)  # not known yet
        settled(data, picture_bytes(0))
        with pytest.raises(UserError, match=rf"data.{key}=\(.*,\) must be on \[0, 1\]"):
            check_channels(data, 3)
        with pytest.raises(UserError, match=rf"data.{key}=\(.*,\) must be on \[0, 1\]"):
            check_channels(make_config(value_range=(0, 4095), **changed), 3)
        check_channels(make_config(dtype="uint16", **changed), 3)


def test_of_8_bit_files_only_the_headers_are_read(make_config, monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("mae_jax.data.decoding.Encoded._load", refuse)
    data = make_config()
    assert settled(data, *(picture_bytes(i, file_format="JPEG") for i in range(20))) == "uint8"
    assert unit_range(data) == (0, 255)


def test_where_all_pictures_are_bad_the_type_is_left_to_the_reader_that_names_them(make_config):
    assert settled(make_config(), b"", None) == "uint8"


@pytest.fixture
def stacks(tmp_path):
    """A folder of 20 arrays uint16 [20, 30, 13] in two classes."""
    for i in range(20):
        file = tmp_path / "train" / "ab"[i % 2] / f"{i}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, RNG.integers(0, 4096, (20, 30, 13)).astype(np.uint16))
    return tmp_path


def test_a_folder_of_arrays_gives_batches_of_their_type_and_bands_that_no_device_keeps(stacks, make_config):
    data = make_config(name="image_folder", path=str(stacks), value_range=(0, 4095), batch_size=4)
    sources = make_sources(data, (16, 16), 13)
    settle_depth(data, sources, 13)
    batches = make_train_batches(sources[0], data, (16, 16), 13)
    batch = next(batches)
    batches.close()
    assert batch["image"].dtype == np.uint16 and batch["image"].shape == (4, 16, 16, 13)
    picture = open_picture(sources[0][int(batch["index"][0])]["image"], 13, 10**6)
    assert set(np.unique(batch["label"])) <= {0, 1} and picture.dtype == np.uint16
    data.bands = (12, 0)
    chosen = make_train_batches(sources[0], data, (16, 16), 2)
    np.testing.assert_array_equal(next(chosen)["image"], batch["image"][..., [12, 0]])
    chosen.close()
    data.on_device = True
    with pytest.raises(UserError, match="data.on_device=True, but the pictures are uint16, not uint8: leave it out"):
        training_batches(sources[0], data, 2, device_mesh(), ["image"], (Stage(0, (16, 16)),), range(9))


def test_pictures_and_arrays_in_one_folder_are_refused_unless_the_extensions_say_which(stacks, make_config):
    Image.new("L", (30, 20)).save(stacks / "train" / "a" / "quick look.png")
    settings = {"name": "image_folder", "path": str(stacks)}
    remedy = re.escape("""Set for example --config.data.extensions="('.npy',)\"""")
    with pytest.raises(UserError, match=rf"both pictures \(a/quick look.png\) and arrays \(a/0.npy\): .*{remedy}"):
        make_sources(make_config(**settings), (16, 16), 13)
    train, evaluation = make_sources(make_config(**settings, extensions=(".NPY",)), (16, 16), 13)
    assert len(train) + len(evaluation) == 20
    with pytest.raises(UserError, match=r"data.extensions=\('.txt',\) must be some of .* .npy"):
        make_sources(make_config(**settings, extensions=(".txt",)), (16, 16), 13)
