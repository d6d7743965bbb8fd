"""Converts pictures of a source to records of prepared data, in parallel pieces, and measures them on the way."""

import dataclasses
import io
from collections import Counter
from typing import Any

import msgpack
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mae_jax.data.arrays import BadImage
from mae_jax.data.sources import Source
from mae_jax.data.statistics import BandStatistics
from mae_jax.data.stored import as_stored
from mae_jax.data.transforms import Size, resize_by_pillow
from mae_jax.runtime.errors import UserError, escaped, reason, with_patience
from mae_jax.workdir.writing import finite_or_null

Kind = tuple[str, int]  # type and channels of a picture


@dataclasses.dataclass
class Piece:
    """What became of some pictures: of the usable ones records and labels, of the others name and reason."""

    records: list[bytes] = dataclasses.field(default_factory=list)
    labels: list[Any] = dataclasses.field(default_factory=list)  # as in JSON: None for NaN
    sizes: set[Size] = dataclasses.field(default_factory=set)
    statistics: dict[Kind, BandStatistics] = dataclasses.field(default_factory=dict)
    pictures: Counter[Kind] = dataclasses.field(default_factory=Counter)
    bad: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def add(self, other: "Piece") -> None:
        """Adds all but the records, which are written at once."""
        self.labels += other.labels
        self.sizes |= other.sizes
        merge_statistics(self.statistics, other.statistics)
        self.pictures += other.pictures
        self.bad += other.bad


@dataclasses.dataclass(frozen=True)
class Converter:
    """Makes a Piece of the pictures range(*pieces[i][1:]) of the split pieces[i][0]."""

    sources: dict[str, Source]
    pieces: list[tuple[str, int, int]]
    data: ConfigDict
    channels: int  # of the model
    short_side: int | None
    quality: int

    def __call__(self, piece: int) -> Piece:
        split, first, end = self.pieces[piece]
        source, found = self.sources[split], Piece()
        for index in range(first, end):
            try:
                self._convert(source, index, found)
            except BadImage as error:
                if self.data.on_bad_image == "raise":
                    raise UserError(
                        f"{source.name_of(index)} cannot be used: {error}; fix or remove it, or set "
                        "data.on_bad_image=replace, which leaves it out"
                    ) from error
                found.bad.append({"name": escaped(source.name_of(index)), "reason": escaped(str(error))})
            except UserError as error:
                raise UserError(f"{source.name_of(index)}: {error}") from error
        return found

    def _convert(self, source: Source, index: int, found: Piece) -> None:
        try:
            record = with_patience(lambda: source[index])
        except OSError as error:
            raise BadImage(reason(error)) from error
        picture = as_stored(record["image"], self.data, self.channels)
        image = {"image": record["image"]} if isinstance(record["image"], bytes) else {"array": _npy(record["image"])}
        if self.short_side and min(picture.shape[:2]) > self.short_side:
            picture = resize_by_pillow(picture, reduced(picture.shape[:2], self.short_side))
            photo = picture.dtype == np.uint8 and picture.shape[2] in (1, 3)
            image = {"image": _jpeg(picture, self.quality)} if photo else {"array": _npy(picture)}
        label = np.asarray(record["label"]).tolist()
        found.records.append(msgpack.packb(image | {"label": label, "name": source.name_of(index)}))
        found.labels.append(finite_or_null(label))
        found.sizes.add(picture.shape[:2])
        kind = picture.dtype.name, picture.shape[2]
        found.pictures[kind] += 1
        statistics = BandStatistics.of(picture)
        statistics.samples = []  # percentiles are for the task inspect
        merge_statistics(found.statistics, {kind: statistics})


def reduced(size: Size, short_side: int) -> Size:
    """The size of a picture whose shorter side becomes `short_side`, its aspect kept."""
    return tuple(max(1, round(side * short_side / min(size))) for side in size)


def _jpeg(picture: np.ndarray, quality: int) -> bytes:
    """Colours at half the resolution (4:2:0), as cameras store them: a third less to decode than in full."""
    stream = io.BytesIO()
    image = Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture)
    image.save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return stream.getvalue()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def merge_statistics(into: dict[Kind, BandStatistics], more: dict[Kind, BandStatistics]) -> None:
    for kind, statistics in more.items():
        if kind in into:
            into[kind].merge(statistics)
        else:
            into[kind] = statistics


def merge_greys(pictures: Counter[Kind], statistics: dict[Kind, BandStatistics]) -> None:
    """Counts grey pictures among colours of their type as colours, which models take them for."""
    for grey in [kind for kind in pictures if kind[1] == 1]:
        colour = grey[0], 3
        if colour in pictures:
            pictures[colour] += pictures.pop(grey)
            if grey in statistics:
                merged = statistics.pop(grey)
                if colour in statistics:  # of one band, if the model sees greys
                    merged = merged.repeated(len(statistics[colour].mean))
                    merged.merge(statistics[colour])
                statistics[colour] = merged


def most_frequent(pictures: Counter[Kind]) -> Kind:
    return max(sorted(pictures), key=pictures.get)
