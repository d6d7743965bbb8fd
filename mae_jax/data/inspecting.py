"""Looks at all pictures of a source before anything is trained: their kinds, sizes and values, the slow and the bad."""

import contextlib
import dataclasses
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from mae_jax.data.arrays import BadImage, fitted
from mae_jax.data.converting import Kind, merge_greys, merge_statistics, most_frequent
from mae_jax.data.sources import Source
from mae_jax.data.statistics import BandStatistics
from mae_jax.data.stored import as_stored
from mae_jax.data.workers import call_ahead, usable_cores
from mae_jax.runtime.errors import UserError, escaped, reason, with_patience

PIECE = 16  # pictures that a thread looks at before handing over what it found
LISTED = 20  # of the slowest and of the largest pictures


class Look(NamedTuple):
    """What is known of a picture."""

    split: str
    index: int
    milliseconds: float = 0  # of processor time to read and decode it
    file_bytes: int = 0
    height: int = 0
    width: int = 0
    kind: Kind | None = None  # None: it is bad
    why: str = ""


@dataclasses.dataclass
class Findings:
    """Looks of all pictures in order, and the values of the training pictures by kind."""

    looks: list[Look] = dataclasses.field(default_factory=list)
    statistics: dict[Kind, BandStatistics] = dataclasses.field(default_factory=dict)

    def kinds(self) -> Counter[Kind]:
        return Counter(look.kind for look in self.looks if look.kind)

    def bad(self) -> list[Look]:
        return [look for look in self.looks if not look.kind]

    def slowest(self) -> list[Look]:
        return sorted((look for look in self.looks if look.kind), key=lambda look: -look.milliseconds)[:LISTED]

    def largest(self) -> list[Look]:
        return sorted((look for look in self.looks if look.kind), key=lambda look: -look.file_bytes)[:LISTED]

    def example(self, kind: Kind) -> Look:
        return next(look for look in self.looks if look.kind == kind)

    def main_kind(self) -> Kind | None:
        """The type and channels of most pictures, among which greys may be colours; None if all are bad."""
        kinds = self.kinds()
        merge_greys(kinds, {})
        return most_frequent(kinds) if kinds else None

    def usable(self, split: str) -> list[int]:
        """Indices of the pictures of the main kind, greys among colours included."""
        kind = self.main_kind()
        wanted = {kind, (kind[0], 1)} if kind and kind[1] == 3 else {kind} - {None}
        return [look.index for look in self.looks if look.split == split and look.kind in wanted]


@dataclasses.dataclass(frozen=True)
class Looker:
    """Looks at the pictures range(*pieces[i][1:]) of the split pieces[i][0]."""

    sources: dict[str, Source]
    pieces: list[tuple[str, int, int]]
    data: ConfigDict
    channels: int

    def __call__(self, piece: int) -> Findings:
        split, first, end = self.pieces[piece]
        found = Findings()
        for index in range(first, end):
            try:
                found.looks.append(self._look(split, index, found))
            except (BadImage, OSError, UserError) as error:
                why = reason(error) if isinstance(error, OSError) else str(error)
                found.looks.append(Look(split, index, why=escaped(why)))
        return found

    def _look(self, split: str, index: int, found: Findings) -> Look:
        source, start = self.sources[split], time.thread_time()
        image = with_patience(lambda: source[index])["image"]
        picture = as_stored(image, self.data, self.channels, self.data.dtype)
        seconds = time.thread_time() - start
        kind = picture.dtype.name, picture.shape[2]
        look = Look(split, index, 1000 * seconds, len(image) if isinstance(image, bytes) else image.nbytes,
                    *picture.shape[:2], kind)  # fmt: skip
        if split == "train":
            picture = self._seen(picture)
            merge_statistics(found.statistics, {kind: BandStatistics.of(picture, self.data.value_range)})
        return look

    def _seen(self, picture: np.ndarray) -> np.ndarray:
        """The channels that the model sees."""
        if self.data.bands is not None or (self.channels, picture.shape[2]) == (1, 3):
            return fitted(picture, self.channels, picture.dtype, self.data.bands)
        return picture


def inspect(sources: dict[str, Source], data: ConfigDict, channels: int) -> Findings:
    """Reads and decodes every picture, in threads (or `data.num_workers` processes). Bad ones are no error."""
    pieces = [
        (split, first, min(first + PIECE, len(source)))
        for split, source in sources.items()
        for first in range(0, len(source), PIECE)
    ]
    look, cores = Looker(sources, pieces, data, channels), usable_cores()
    threads = max(1, cores // max(1, data.num_workers))
    found = call_ahead(look, len(pieces), workers=data.num_workers, threads=threads, ahead=4 * cores)
    total, merged = sum(map(len, sources.values())), Findings()
    bar = tqdm(total=total, unit=" pictures", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    with bar, contextlib.closing(found):
        for part in found:
            merged.looks += part.looks
            merge_statistics(merged.statistics, part.statistics)
            bar.update(len(part.looks))
    return merged


def describe_statistics(found: Findings, data: ConfigDict) -> dict[str, Any]:
    """The content of statistics.json: of the training pictures of the main kind."""
    kinds, statistics = found.kinds(), dict(found.statistics)
    merge_greys(kinds, statistics)
    kind = found.main_kind()
    if kind not in statistics:
        return {}
    summary = statistics[kind].summary()
    return {
        "mean": summary["mean"],
        "std": summary["std"],
        "value_range": data.value_range and list(data.value_range),
        "dtype": data.dtype or kind[0],
        "bands": None if data.bands is None else list(data.bands),
        "channels": len(summary["mean"]),
        "pictures": kinds[kind],
        **summary,
    }
