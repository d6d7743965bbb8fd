"""Values of pictures by band: measured in one pass, kept in a file, taken over by a run's settings."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.transforms import Range
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.workdir.writing import read_object

STATISTICS, DESCRIPTION = "statistics.json", "description.json"  # of the task inspect, of prepared data
SETTINGS = ("value_range", "mean", "std")
PERCENTILES = (1, 50, 99)
SAMPLED = 256  # values of a picture's band that the percentiles come from
MAX_SAMPLES = 2**22  # values of a band that are kept for them
AT_ONCE = 2**22  # pixels of a picture


@dataclasses.dataclass
class BandStatistics:
    """Count, mean, squared deviations and limits of the values of each band, float64 [c]; NaN, no data, is left out.

    Mean and deviations are in the units of the settings: with a value range clipped to it and on [0, 1], as are 8 bits
    without one, else as stored. Parts merge as in Chan, Golub and LeVeque (1979), so no digits are lost to large means.
    """

    count: np.ndarray
    missing: np.ndarray  # values that are NaN
    mean: np.ndarray
    squares: np.ndarray  # sums of squared deviations from the mean
    low: np.ndarray  # as stored, as is the next
    high: np.ndarray
    samples: list[np.ndarray] = dataclasses.field(default_factory=list)  # some values as stored, [n, c] each

    @classmethod
    def of(cls, picture: np.ndarray, value_range: Range | None = None) -> "BandStatistics":
        """Of one picture [h, w, c] of numbers."""
        values = picture.reshape(-1, picture.shape[-1])
        found = [cls._of(values[first : first + AT_ONCE], value_range) for first in range(0, len(values), AT_ONCE)]
        for part in found[1:]:
            found[0].merge(part)
        found[0].samples = [values[:: -(-len(values) // SAMPLED)].astype(np.float32)]
        return found[0]

    @classmethod
    def _of(cls, values: np.ndarray, value_range: Range | None) -> "BandStatistics":
        if value_range is None and values.dtype == np.uint8:
            value_range = 0, 255
        return cls(*np.transpose([_band(values[:, band], value_range) for band in range(values.shape[1])]))

    def merge(self, other: "BandStatistics") -> None:
        """Adds another part of the pictures."""
        total = np.maximum(self.count + other.count, 1)
        apart = other.mean - self.mean
        self.mean = self.mean + apart * (other.count / total)
        self.squares = self.squares + other.squares + apart**2 * (self.count * other.count / total)
        self.count, self.missing = self.count + other.count, self.missing + other.missing
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        if sum(map(len, self.samples)) < MAX_SAMPLES:
            self.samples += other.samples

    def repeated(self, channels: int) -> "BandStatistics":
        """Of one band as several equal ones."""
        parts = {name: np.repeat(array, channels) for name, array in vars(self).items() if name != "samples"}
        return BandStatistics(**parts, samples=[np.repeat(some, channels, axis=1) for some in self.samples])

    def summary(self) -> dict[str, Any]:
        """For JSON: mean, std (the population's), min, max and percentiles (of a sample) by band, the share no_data."""
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        missing = float(self.missing.sum() / max((self.count + self.missing).sum(), 1))
        found = {"mean": self.mean.tolist(), "std": std.tolist(), "min": _finite(self.low), "max": _finite(self.high)}
        if self.samples:
            values = np.concatenate(self.samples)
            empty = np.isnan(values).all(0)
            rows = np.nanpercentile(np.where(empty, 0, values), PERCENTILES, axis=0)
            rows[:, empty] = np.nan
            found["percentiles"] = {str(p): _finite(row) for p, row in zip(PERCENTILES, rows, strict=True)}
        return found | {"no_data": missing}

    def to_lists(self) -> dict[str, list[float]]:
        """All but the samples, exactly, for `from_lists`; infinite where a band has no data."""
        return {name: array.tolist() for name, array in vars(self).items() if name != "samples"}

    @classmethod
    def from_lists(cls, found: dict[str, list[float]]) -> "BandStatistics":
        return cls(**{name: np.asarray(values) for name, values in found.items()})


def _band(values: np.ndarray, value_range: Range | None) -> tuple[float, ...]:
    """Count, missing, mean, squares, low and high of values [n]."""
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:  # 4 times as fast, and exact
        values = values.astype(np.int64)
        weights = np.bincount(values - values.min())
        levels = np.arange(len(weights)) + float(values.min())
        missing = 0
    else:
        values = values.astype(np.float64)
        levels = values[~np.isnan(values)]
        weights, missing = np.ones(len(levels)), len(values) - len(levels)
    if not len(levels):
        return 0, missing, 0, 0, np.inf, -np.inf
    low, high, count = levels.min(), levels.max(), weights.sum()
    if value_range is not None:
        black, white = value_range
        levels = (np.clip(levels, black, white) - black) / (white - black)
    mean = (weights * levels).sum() / count
    return count, missing, mean, (weights * (levels - mean) ** 2).sum(), low, high


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def take_statistics(config: ConfigDict, trained: dict[str, Any] | None = None) -> list[str]:
    """Sets data.value_range, mean and std, but for those on the command line, as `data.statistics` says.

    data.name=prepared other than of 8-bit grey or RGB pictures tell their own, unless the command line does. A
    checkpoint's config (`trained`) that has the same `data.statistics`, or the same kind of data, knows the values.
    Returns notes for users; UserError for a file that is missing, foreign, or of other bands or channels.
    """
    data, channels = config.data, config.model.channels
    wanted = [name for name in SETTINGS if f"data.{name}" not in config.given]
    own, knows = trained["data"] if trained else {}, trained is not None and "mean" in trained["data"]
    if knows and data.statistics and own.get("statistics") == data.statistics:
        data.update({name: own[name] for name in wanted})
        return []
    if data.statistics:
        found = from_main(is_main() and find_statistics(data, channels))
        if "value_range" not in wanted and len(wanted) > 1 and _value(found["value_range"]) != data.value_range:
            raise UserError(
                f"data.statistics={data.statistics} was measured with data.value_range={_value(found['value_range'])}, "
                f"not {data.value_range}: measure again with that, or leave it out"
            )
        data.update({name: _value(found[name]) for name in wanted})
        return []
    if data.name != "prepared" or len(wanted) < len(SETTINGS) or data.value_range is not None:
        return []
    if knows:
        deep = own.get("dtype") not in ("uint8", None) or channels not in (1, 3)
        data.update({name: own[name] for name in wanted if deep and own.get("name") == "prepared"})
        return []
    path = Path(data.path or "") / DESCRIPTION
    found = from_main(is_main() and read_object(path))  # if there is none, the source says so
    if (
        not found
        or not _numbers(found.get("mean"))
        or (found.get("dtype") == "uint8" and found.get("channels") in (1, 3))
    ):
        return []
    found = from_main(is_main() and _fitting(found, str(path), data, channels))
    data.update({name: _value(found[name]) for name in SETTINGS})
    return [f"mean and std of the bands are those of the prepared pictures ({path})"]


def find_statistics(data: ConfigDict, channels: int) -> dict[str, Any]:
    """The statistics in the file or folder `data.statistics`, of the model's bands. UserError if they do not fit."""
    path = Path(data.statistics)
    files = [path / STATISTICS, path / DESCRIPTION] if path.is_dir() else [path]
    found = next((values for file in files if (values := read_object(file)) is not None), None)
    remedy = "give the statistics.json of configs/inspect.py, or a prepared folder"
    if found is None:
        what = "is no JSON of statistics" if path.is_file() else "holds none" if path.exists() else "does not exist"
        raise UserError(f"data.statistics={data.statistics} {what}: {remedy}")
    mean, std = found.get("mean"), found.get("std")
    if not (
        _numbers(mean)
        and _numbers(std)
        and len(mean) == len(std)
        and {"value_range", "dtype", "bands", "channels"} <= {*found}
    ):
        raise UserError(f"data.statistics={data.statistics} has no mean and std for each band: {remedy}")
    return _fitting(found, f"data.statistics={data.statistics}", data, channels)


def _fitting(found: dict[str, Any], whose: str, data: ConfigDict, channels: int) -> dict[str, Any]:
    """The statistics of the bands that the model sees, its std above 0."""
    own, asked = found["bands"], None if data.bands is None else list(data.bands)
    if own is None and asked and max(asked) < len(found["mean"]):
        found |= {name: [found[name][band] for band in asked] for name in ("mean", "std")}
    elif (own and list(own)) != asked:
        raise UserError(f"{whose} is of data.bands={own and tuple(own)}, not data.bands={data.bands}: measure again")
    if len(found["mean"]) not in (1, channels):
        raise UserError(
            f"{whose} has {len(found['mean'])} bands, but model.channels={channels}: set model.channels, or data.bands"
        )
    in_bytes = [dtype == "uint8" for dtype in (found["dtype"], data.dtype or found["dtype"])]
    if found["value_range"] is None and in_bytes[0] != in_bytes[1]:
        raise UserError(f"{whose} is of {found['dtype']} pictures, but data.dtype={data.dtype}: measure again with it")
    return found | {"std": [value or 1.0 for value in found["std"]]}  # a band of one value is zero whatever its std


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, int | float) for value in values)


def _value(found: Any) -> Any:
    return tuple(found) if isinstance(found, list) else found
