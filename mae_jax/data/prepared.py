"""Data that the task prepare has written, as a source: ArrayRecord shards and their description."""

import errno
import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.files import check_exists, first_few
from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.records import Records
from mae_jax.data.sources import Source
from mae_jax.data.statistics import DESCRIPTION
from mae_jax.data.transforms import Size
from mae_jax.runtime.errors import UserError, reason
from mae_jax.workdir.writing import read_object

FORMAT = 1  # of shards and description
SPLITS = ("train", "eval")
PLAN = "preparing.json"  # there while the folder is being prepared


class Shard(NamedTuple):
    """What ArrayRecord's reader needs to know, so that it opens a file only to read it."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Prepared(Source):
    """One split of a prepared folder, `data.path`: the records of its source, in their order.

    A record is a msgpack map: "image", the bytes of a picture file, or "array", those of a .npy file; "label"; "name".
    Raises UserError for a folder that is not prepared, or not wholly, and for shards of another size than described.
    """

    knows_labels = True

    def __init__(self, split: str, data: ConfigDict, image_size: Size, channels: int):
        folder, about = read_description(data.path)
        found = about["splits"][split]
        if not found["examples"]:
            kind = NothingToTrainOn if split == "train" else UserError
            what = "training" if split == "train" else "evaluation"
            raise kind(f"data.path={data.path} was prepared from data without {what} pictures: prepare it from others")
        _check_shards(folder, found["shards"])
        shards = [
            Shard(str(folder / shard["file"]), 0, shard["examples"], shard["examples"]) for shard in found["shards"]
        ]
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._records = Records(ArrayRecordDataSource([shard for shard in shards if shard.take]))
        self._labels = folder / found["labels"]
        self._digest = hashlib.sha256("".join(shard["sha256"] for shard in found["shards"]).encode()).hexdigest()
        self.label_kind, self.class_names = about["label_kind"], about["class_names"]
        self.picture_size = tuple(about["picture_size"]) if about["picture_size"] else None
        self.place = f"in {data.path} ({split})"
        left_out = [f"{bad['name']} ({bad['reason']})" for name in SPLITS for bad in about["splits"][name]["left_out"]]
        self.notes = [f"bad pictures, left out when it was prepared: {first_few(left_out)}"] if left_out else []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        record = self._record(index)
        image = record["image"] if "image" in record else np.load(io.BytesIO(record["array"]), allow_pickle=False)
        label = record["label"]
        return {"image": image, "label": np.asarray(label, np.float32) if isinstance(label, list) else label}

    def _record(self, index: int) -> dict:
        record = self._records.read(lambda records: records[index])
        try:
            return msgpack.unpackb(record)
        except ValueError as error:  # an empty record of a file that was cut short
            raise OSError(errno.EBADMSG, "the record is damaged") from error

    def labels(self) -> np.ndarray:
        try:
            return np.load(self._labels, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"{self._labels} cannot be read: {reason(error)}; prepare the data again") from error

    def digest(self) -> str:
        return self._digest

    def name_of(self, index: int) -> str:
        try:
            return self._record(index)["name"]
        except OSError:
            return super().name_of(index)


def read_description(path: str | None) -> tuple[Path, dict[str, Any]]:
    """The folder `data.path` and what is in it; UserError if it is not prepared, or not wholly."""
    if not path:
        raise UserError("data.path is not set: data.name=prepared needs a folder that configs/prepare.py has made")
    check_exists(path)
    folder = Path(path)
    if (about := read_object(folder / DESCRIPTION)) is None:
        if (folder / PLAN).exists():
            raise UserError(f"data.path={path} is only half prepared: run the same command of configs/prepare.py again")
        raise UserError(f"data.path={path} has no {DESCRIPTION}: name a folder that configs/prepare.py has made")
    if about.get("format") != FORMAT:
        remedy = "name a folder that configs/prepare.py has made, or prepare it again"
        raise UserError(f"{folder / DESCRIPTION} is not of the format {FORMAT} of prepared data: {remedy}")
    return folder, about


def _check_shards(folder: Path, shards: list[dict[str, Any]]) -> None:
    for shard in shards:
        file = folder / shard["file"]
        size = file.stat().st_size if file.is_file() else None
        if size != shard["bytes"]:
            what = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
            raise UserError(f"{file} {what}: copy it again (SHA256SUMS), or prepare the data again")
