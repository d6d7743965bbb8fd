"""Settles the type of a run's pictures by a look at some of them, before anything is trained."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.arrays import BadImage, Misfit, batch_dtype
from mae_jax.data.decoding import Encoded, open_picture
from mae_jax.data.fast_jpeg import PlainJpeg
from mae_jax.data.sources import Source
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.settings.fields import defaults

LOOKED_AT = 8  # pictures of each split
FAR = 30  # standard deviations: no channel's mean over several pictures is as far from that of all


class _Look(NamedTuple):
    name: str
    dtype: str  # of a batch of such pictures
    values: tuple[float, float, np.ma.MaskedArray] | None  # least, largest, mean [channels]; None: not decoded, or none


def settle_depth(data: ConfigDict, sources: Sequence[Source | None], channels: int) -> None:
    """Sets `data.dtype`, if it is open, to what the first readable picture needs; the same in all processes.

    Looks at a few pictures of each source. Raises UserError if their types differ, if they do not suit `data.dtype`,
    `data.bands` and the model's channels, or if nothing says what their values mean: others than uint8 need
    `data.value_range`, or a mean and std of their own.
    """
    data.dtype = from_main(is_main() and _find_dtype(data, sources, channels))


def _find_dtype(data: ConfigDict, sources: Sequence[Source | None], channels: int) -> str:
    looks = list(_look(data, sources, channels))
    if not looks:
        return data.dtype or "uint8"  # the loader tells what is wrong with them
    first, dtype = looks[0], looks[0].dtype
    for look in looks:
        if look.dtype != dtype:
            both = batch_dtype(np.promote_types(look.dtype, dtype))
            raise UserError(
                f"{first.name} is {dtype}, but {look.name} {look.dtype}: make them alike, or set data.dtype={both}, "
                "which takes the values of both as they are"
            )
    if dtype != "uint8" and data.value_range is None:
        _check_scale(data, looks)
    return dtype


def _look(data: ConfigDict, sources: Sequence[Source | None], channels: int) -> Iterator[_Look]:
    for source in filter(None, sources):
        for index in np.unique(np.linspace(0, len(source) - 1, LOOKED_AT).astype(int)).tolist():
            try:
                image = source[index]["image"]
            except OSError:  # the loader deals with bad pictures
                continue
            name = source.name_of(index)
            try:
                picture = open_picture(image, channels, data.max_pixels, data.dtype, data.bands)
                # 8-bit files need no decoding: their values are 0 to 255.
                measured = picture.dtype != np.uint8 or not isinstance(picture, Encoded | PlainJpeg)
                values = _measure(picture.whole()) if measured else None
            except (Misfit, UserError) as error:
                raise UserError(f"{name}: {error}") from error
            except BadImage:
                continue
            yield _Look(name, str(picture.dtype), values)


def _measure(picture: np.ndarray) -> tuple[float, float, np.ma.MaskedArray] | None:
    valid = np.ma.masked_invalid(picture, copy=False)  # NaN is no data
    return (valid.min(), valid.max(), valid.mean(axis=(0, 1), dtype=np.float64)) if valid.count() else None


def _check_scale(data: ConfigDict, looks: Sequence[_Look]) -> None:
    """Raises UserError if `data.mean` and `data.std` cannot be those of the pictures."""
    found = [look for look in looks if look.values]
    if not found:
        return
    lows, highs, means = zip(*(look.values for look in found), strict=True)
    mean, std, usual = np.asarray(data.mean), np.asarray(data.std), defaults().data
    if tuple(data.mean) == tuple(usual.mean) or tuple(data.std) == tuple(usual.std):
        why = "nothing says which are black and white"
    elif (np.abs(np.ma.stack(means).mean(axis=0) - mean) > FAR * std).any():
        why = f"data.mean={tuple(data.mean)} and data.std={tuple(data.std)} are not of such values"
    else:
        return
    raise UserError(
        f"{found[0].name}: {found[0].dtype} pictures with values from {min(lows):g} to {max(highs):g}, and {why}: set "
        "data.value_range=(low, high), or measure mean and std by configs/inspect.py, whose statistics.json "
        "data.statistics takes"
    )
