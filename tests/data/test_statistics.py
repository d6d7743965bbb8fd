"""Statistics of bands against NumPy's in float64, and what a run takes over from a file of them."""

import json

import numpy as np
import pytest

from configs.common import get_config
from mae_jax.data.statistics import BandStatistics, take_statistics
from mae_jax.runtime.errors import UserError


def merged(pictures, value_range=None, groups=3):
    parts = [BandStatistics.of(picture, value_range) for picture in pictures]
    while len(parts) > 1:  # as a tree: pieces are merged before they are merged into the whole
        parts = [parts[n : n + groups] for n in range(0, len(parts), groups)]
        for first, *others in parts:
            for other in others:
                first.merge(other)
        parts = [first for first, *_ in parts]
    return parts[0]


def pictures_of(dtype, count=10):
    rng = np.random.default_rng(0)
    least = 0 if dtype == np.uint8 else 4000
    return [rng.integers(least, least + 250, (5 + n, 7, 4)).astype(dtype) for n in range(count)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float16, np.float32])
def test_merged_statistics_are_those_of_all_values_at_once(dtype):
    pictures = pictures_of(dtype)
    values = np.concatenate([picture.reshape(-1, 4) for picture in pictures]).astype(np.float64)
    unit = 255 if dtype == np.uint8 else 1
    found = merged(pictures).summary()
    np.testing.assert_allclose(found["mean"], values.mean(0) / unit, rtol=1e-13)
    np.testing.assert_allclose(found["std"], values.std(0) / unit, rtol=1e-12)
    assert (found["min"], found["max"]) == (values.min(0).tolist(), values.max(0).tolist())


def test_nothing_is_lost_to_a_large_mean():
    pictures = [
        np.float32(1e6) + np.random.default_rng(n).integers(0, 4, (64, 64, 1)).astype(np.float32) for n in range(40)
    ]
    values = np.stack(pictures).astype(np.float64)
    np.testing.assert_allclose(merged(pictures).summary()["std"], [values.std()], rtol=1e-12)


def test_nan_is_left_out_of_everything_but_its_own_share():
    pictures = pictures_of(np.float32)
    for picture in pictures:
        picture[::2, :3, 1:3] = np.nan
    values = np.concatenate([picture.reshape(-1, 4) for picture in pictures]).astype(np.float64)
    found = merged(pictures).summary()
    np.testing.assert_allclose(found["mean"], np.nanmean(values, 0), rtol=1e-13)
    np.testing.assert_allclose(found["std"], np.nanstd(values, 0), rtol=1e-12)
    assert found["no_data"] == pytest.approx(np.isnan(values).mean())


def test_a_band_without_any_data_has_no_limits():
    picture = np.full((3, 3, 2), np.nan, np.float32)
    picture[..., 0] = 7
    found = merged([picture, picture]).summary()
    assert found["min"] == [7, None] and found["mean"] == [7, 0] and found["percentiles"]["50"] == [7, None]


def test_a_range_clips_values_and_puts_them_on_0_to_1():
    pictures = pictures_of(np.uint16)
    values = np.clip(np.concatenate([p.reshape(-1, 4) for p in pictures]).astype(np.float64), 4050, 4150)
    found = merged(pictures, (4050, 4150)).summary()
    np.testing.assert_allclose(found["mean"], ((values - 4050) / 100).mean(0), rtol=1e-13)
    np.testing.assert_allclose(found["std"], ((values - 4050) / 100).std(0), rtol=1e-12)


def test_pieces_that_were_written_and_read_again_merge_to_the_same_bits():
    one, other = merged(pictures_of(np.float32)[:4]), merged(pictures_of(np.float32)[4:])
    again = [BandStatistics.from_lists(json.loads(json.dumps(part.to_lists()))) for part in (one, other)]
    one.merge(other)
    again[0].merge(again[1])
    assert again[0].to_lists() == one.to_lists()


GOOD = {"mean": [10.0, 20.0, 30.0], "std": [1.0, 2.0, 0.0], "value_range": None, "dtype": "uint16", "bands": None,
        "channels": 3}  # fmt: skip


@pytest.fixture
def config():
    found = get_config()
    found.given = ()
    found.data.name = "image_folder"
    return found


def write(folder, config, **changed):
    file = folder / "statistics.json"
    file.write_text(json.dumps(GOOD | changed))
    config.data.statistics = str(file)


def test_a_run_takes_mean_and_std_from_the_file_or_its_folder(tmp_path, config):
    write(tmp_path, config)
    for place in (config.data.statistics, str(tmp_path)):
        config.data.update(statistics=place, mean=(0.0,), std=(1.0,))
        take_statistics(config)
        assert config.data.mean == (10.0, 20.0, 30.0) and config.data.std == (1.0, 2.0, 1.0)  # 0 cannot be divided by


def test_what_the_command_line_gives_stays(tmp_path, config):
    write(tmp_path, config)
    config.given, config.data.std = ("data.std",), (5.0,)
    take_statistics(config)
    assert (config.data.mean, config.data.std) == ((10.0, 20.0, 30.0), (5.0,))


def test_statistics_of_all_bands_serve_a_choice_of_them(tmp_path, config):
    write(tmp_path, config)
    config.data.bands, config.model.channels = (2, 0), 2
    take_statistics(config)
    assert config.data.mean == (30.0, 10.0)


def test_a_checkpoint_knows_its_statistics_without_the_file(config):
    config.data.statistics = "/gone/statistics.json"
    take_statistics(config, {"data": {"statistics": "/gone/statistics.json", "mean": (7.0,), "std": (2.0,),
                                      "value_range": None}})  # fmt: skip
    assert (config.data.mean, config.data.std) == ((7.0,), (2.0,))


@pytest.mark.parametrize("dtype, kept", [("uint16", True), ("uint8", False)])
def test_a_run_on_deep_prepared_pictures_that_goes_on_keeps_its_values(config, dtype, kept):
    config.data.update(name="prepared", mean=(0.5,), std=(0.25,))
    known = {"name": "prepared", "statistics": None, "dtype": dtype, "value_range": None, "mean": (7.0,), "std": (2.0,)}
    take_statistics(config, {"data": known})
    assert (config.data.mean, config.data.std) == (((7.0,), (2.0,)) if kept else ((0.5,), (0.25,)))


@pytest.mark.parametrize(
    "changed, settings, message",
    [
        ({}, {"channels": 4}, "has 3 bands, but model.channels=4"),
        ({"bands": [0, 1, 2]}, {}, r"is of data.bands=\(0, 1, 2\), not data.bands=None"),
        ({"mean": None}, {}, "has no mean and std for each band"),
        ({"dtype": "uint8"}, {"dtype": "uint16"}, "is of uint8 pictures, but data.dtype=uint16"),
        ({}, {"value_range": (0, 99)}, r"measured with data.value_range=None, not \(0, 99\)"),
        ({}, {"statistics": "/no/such/file"}, "data.statistics=/no/such/file does not exist"),
        ({}, {"statistics": __file__}, "is no JSON of statistics"),
        ({}, {"statistics": "/usr"}, "data.statistics=/usr holds none"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_a_line_that_says_why(tmp_path, config, changed, settings, message):
    write(tmp_path, config, **changed)
    config.given = tuple(f"data.{name}" for name in settings)
    for name, value in settings.items():
        group = config.model if name == "channels" else config.data
        group[name] = value
    with pytest.raises(UserError, match=message):
        take_statistics(config)
