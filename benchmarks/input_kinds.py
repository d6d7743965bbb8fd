"""The pictures of an image folder in the other forms that `data.name` reads: the same bytes, classes and order."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from configs.common import get_config
from mae_jax.data.preparing import prepare
from mae_jax.data.sources import Source

SPLITS = ("train", "validation")
SHARDS = 3  # of tars


def write_kinds(out: Path, *sources: Source) -> dict[str, dict[str, str]]:
    """Writes both splits in every form into a new folder: name -> the settings `data.*` that read it.

    "prepared" has the same files, "prepared, side 256" the pictures with a shorter side of 256 pixels.
    """
    out.mkdir(parents=True)
    kinds = {"table": write_table(out, *sources), "parquet": write_parquet(out, *sources)}
    kinds["webdataset"] = write_tars(out, *sources)
    for name, side in (("prepared", None), ("prepared, side 256", 256)):
        kinds[name] = write_prepared(out / f"prepared_{side}", kinds["table"], side)
    return kinds


def write_prepared(out: Path, table: dict[str, str], short_side: int | None) -> dict[str, str]:
    """What the task prepare makes of a table."""
    config = get_config()
    config.data.update(table)
    config.prepare.short_side = short_side
    out.mkdir()
    prepare(config, out)
    return {"name": "prepared", "path": str(out)}


def write_table(out: Path, *sources: Source) -> dict[str, str]:
    """A table of the folder's own files. Returns the settings `data.*` that read it, as the other functions do."""
    with open(out / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "label", "split"))
        for split, source in zip(SPLITS, sources, strict=True):
            for index, label in enumerate(source.labels()):
                writer.writerow((Path(source.name_of(index)).absolute(), source.class_names[label], split))
    return {"name": "table", "path": str(out / "labels.csv")}


def write_parquet(out: Path, *sources: Source, rows: int = 100) -> dict[str, str]:
    """Parquet files as Hugging Face's datasets has them, with `rows` pictures in a row group."""
    (out / "parquet").mkdir()
    for split, source in zip(SPLITS, sources, strict=True):
        images = [{"bytes": source[index]["image"], "path": f"{index}.jpg"} for index in range(len(source))]
        label = {"names": list(source.class_names), "_type": "ClassLabel"}
        features = {"image": {"_type": "Image"}, "label": label}
        struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        schema = pa.schema({"image": struct, "label": pa.int64()}, metadata)
        table = pa.table({"image": images, "label": source.labels()}, schema)
        pq.write_table(table, out / "parquet" / f"{split}-00000-of-00001.parquet", row_group_size=rows)
    return {"name": "parquet", "path": str(out / "parquet")}


def write_tars(out: Path, *sources: Source) -> dict[str, str]:
    """WebDataset's tars: of each picture KEY.jpg and KEY.cls, the class's name."""
    (out / "tars").mkdir()
    for split, source in zip(SPLITS, sources, strict=True):
        labels, share = source.labels(), -(-len(source) // SHARDS)
        for shard in range(SHARDS):
            with tarfile.open(out / "tars" / f"{split}-{shard:06d}.tar", "w") as tar:
                for index in range(shard * share, min((shard + 1) * share, len(source))):
                    name = source.class_names[labels[index]].encode()
                    for extension, content in (("jpg", source[index]["image"]), ("cls", name)):
                        member = tarfile.TarInfo(f"{index:08d}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    return {"name": "webdataset", "path": str(out / "tars")}
