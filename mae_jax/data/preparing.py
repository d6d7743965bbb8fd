"""Writes the pictures of any source as ArrayRecord shards that are read quickly, with their description."""

import collections
import contextlib
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict
from tqdm import tqdm

from mae_jax.data.converting import Converter, Piece, merge_greys, merge_statistics, most_frequent
from mae_jax.data.files import first_few
from mae_jax.data.image_folder import NothingToTrainOn
from mae_jax.data.loader import too_many_bad
from mae_jax.data.prepared import FORMAT, PLAN, SPLITS
from mae_jax.data.sources import Source, describe_sources, make_source, make_sources, no_labels
from mae_jax.data.statistics import DESCRIPTION, BandStatistics
from mae_jax.data.workers import call_ahead, usable_cores
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.workdir.writing import finite_or_null, read_object, replacing, write_atomically, write_json

SUMS = "SHA256SUMS"  # `sha256sum --check SHA256SUMS` verifies the shards
OPTIONS = "group_size:1,uncompressed"  # each record alone, so that any is read at once; JPEGs are compressed already
PIECE = 16  # pictures that a worker converts before handing them over
FEW = 64  # pictures for each core, for which processes are not worth their start
# Settings of `data` that decide which pictures there are, and their labels.
CHOSEN = (
    "name", "path", "root", "train_split", "eval_split", "eval_fraction", "stratify", "image_column", "label_column",
    "split_column", "group_column", "label_kind", "label_separator", "extensions", "num_examples", "max_pixels",
    "dtype", "bands",
)  # fmt: skip


def open_to_prepare(config: ConfigDict) -> dict[str, Source]:
    """Both splits by name; training may be missing."""
    arguments = config.data, MAEConfig(**config.model).image_size, config.model.channels
    try:
        return dict(zip(SPLITS, make_sources(*arguments), strict=True))
    except NothingToTrainOn:
        return {"eval": make_source(config.data, "eval", *arguments[1:])}


def prepare(config: ConfigDict, workdir: Path) -> dict[str, Any] | None:
    """Writes the shards and then description.json, which it returns; None if that is there already.

    A run that was stopped goes on with the shards that are not whole yet. Raises UserError for a workdir with other
    data, for unusable pictures and for a picture that `data.on_bad_image` does not leave out.
    """
    settings = _settings(config)
    if (done := read_object(workdir / DESCRIPTION)) is not None:
        _check_same(workdir, done.get("settings", {}), settings)
        for left in workdir.glob("*.array_record.json"):  # of a run that was stopped while it tidied up
            left.unlink()
        (workdir / PLAN).unlink(missing_ok=True)
        return None
    sources = open_to_prepare(config)
    say(*describe_sources(config.data.name, sources.get("train"), sources["eval"]))
    plan = {"settings": settings, "source": {split: _describe(source) for split, source in sources.items()}}
    if (before := read_object(workdir / PLAN)) is not None:
        _check_same(workdir, before["settings"], settings)
        if before != plan:
            raise UserError(f"--workdir={workdir} is half prepared from data that have changed since: choose another")
    write_json(workdir / PLAN, plan)
    shards = {split: _shards(split, len(source), config.prepare.shard_examples) for split, source in sources.items()}
    _write_shards(config, workdir, sources, [shard for split in shards.values() for shard in split])
    facts = {split: [read_object(workdir / f"{file}.json") for file, *_ in shards.get(split, ())] for split in SPLITS}
    about = _finish(config, workdir, sources["eval"], facts, settings)
    for file in (*workdir.glob("*.array_record.json"), workdir / PLAN):
        file.unlink()
    return about


def _settings(config: ConfigDict) -> dict[str, Any]:
    chosen = {f"data.{name}": config.data[name] for name in CHOSEN}
    for key in ("data.path", "data.root"):
        chosen[key] = chosen[key] and os.path.abspath(chosen[key]) if "://" not in str(chosen[key]) else chosen[key]
    chosen |= {f"prepare.{name}": value for name, value in config.prepare.items()}
    chosen["model.channels"] = config.model.channels  # of files with transparency it decides what is kept
    if config.prepare.short_side is None:
        del chosen["prepare.quality"]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}


def _describe(source: Source) -> dict[str, Any]:
    """What tells a source from another."""
    some = sorted({*range(min(4, len(source))), *range(0, len(source), max(1, len(source) // 16))})
    names = source.class_names and list(source.class_names)
    return {
        "examples": len(source), "label_kind": source.label_kind, "class_names": names,
        "names": [escaped(source.name_of(index)) for index in some], "digest": source.digest(),
        "labels": hashlib.sha256(source.labels().tobytes()).hexdigest() if source.knows_labels else None,
    }  # fmt: skip


def _check_same(workdir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise UserError(
                f"--workdir={workdir} holds data prepared with {key}={before.get(key)!r}, not {now.get(key)!r}: choose "
                "another folder, or give the same settings"
            )


def _shards(split: str, examples: int, shard_examples: int) -> list[tuple[str, str, int, int]]:
    """(file, split, first picture, end) of each."""
    count = -(-examples // shard_examples)
    bounds = [round(place * examples / count) for place in range(count + 1)] if count else [0]
    names = (f"{split}-{place:05}-of-{count:05}.array_record" for place in range(count))
    return [(name, split, *ends) for name, ends in zip(names, zip(bounds, bounds[1:], strict=False), strict=True)]


def _write_shards(config: ConfigDict, workdir: Path, sources: dict[str, Source], shards: list[tuple]) -> None:
    """Writes those that are not there yet, in order, and beside each what the description needs of it."""
    written = {file: _read_whole(workdir / file) for file, *_ in shards}
    waiting = [shard for shard in shards if written[shard[0]] is None]
    pieces = {file: _pieces(split, first, end) for file, split, first, end in waiting}
    everything = [piece for some in pieces.values() for piece in some]
    prepare = config.prepare
    converter = Converter(sources, everything, config.data, config.model.channels, prepare.short_side, prepare.quality)
    total = sum(end - first for _, _, first, end in shards)
    done = total - sum(end - first for _, _, first, end in waiting)
    cores = usable_cores()
    # Processes take seconds to start, and threads wait for one another.
    workers = config.data.num_workers or (cores if total - done > FEW * cores else 0)
    found = call_ahead(converter, len(everything), workers=workers, threads=1 if workers else cores, ahead=cores)
    bad = [each for facts in written.values() if facts for each in facts["left_out"]]
    if done:
        say(f"{workdir}: {len(shards) - len(waiting):,} of {len(shards):,} shards are there already")
    bar = tqdm(total=total, initial=done, unit=" pictures", disable=not sys.stderr.isatty(), dynamic_ncols=True)
    with bar, contextlib.closing(found):
        for file, *_ in waiting:
            merged = Piece()
            with replacing(workdir / file) as temporary:
                writer = ArrayRecordWriter(str(temporary), OPTIONS)
                for _, first, end in pieces[file]:
                    piece = next(found)
                    for record in piece.records:
                        writer.write(record)
                    merged.add(piece)
                    bad += piece.bad
                    for each in piece.bad:
                        say(f"left out: {each['name']} ({each['reason']})")
                    bar.update(end - first)
                    done += end - first
                    if too_many_bad(len(bad), done, total):
                        raise UserError(
                            f"{len(bad)} of the first {done} pictures, of {total}, cannot be used: "
                            f"{first_few([each['name'] for each in bad])} (the last: {bad[-1]['reason']}); up to 1 % "
                            "are left out: remove or fix such files"
                        )
                writer.close()
                facts = _facts(temporary, merged)
            write_json(workdir / f"{file}.json", {"file": file} | facts)


def _read_whole(shard: Path) -> dict[str, Any] | None:
    """What is beside a shard that is there as it was written; None if it has to be written (again)."""
    facts = read_object(shard.with_name(f"{shard.name}.json"))
    return facts if facts and shard.is_file() and shard.stat().st_size == facts["bytes"] else None


def _pieces(split: str, first: int, end: int) -> list[tuple[str, int, int]]:
    return [(split, start, min(start + PIECE, end)) for start in range(first, end, PIECE)]


def _facts(shard: Path, merged: Piece) -> dict[str, Any]:
    """What the description needs of a whole shard."""
    with shard.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    kinds = {f"{dtype} {channels}": (dtype, channels) for dtype, channels in sorted(merged.pictures)}
    return {
        "examples": len(merged.labels), "bytes": shard.stat().st_size, "sha256": digest, "labels": merged.labels,
        "sizes": sorted(merged.sizes)[:2], "left_out": merged.bad,  # two sizes say that there are several
        "pictures": {name: merged.pictures[kind] for name, kind in kinds.items()},
        "statistics": {name: merged.statistics[kind].to_lists() for name, kind in kinds.items()},
    }  # fmt: skip


def _finish(
    config: ConfigDict, workdir: Path, source: Source, facts: dict[str, list[dict[str, Any]]], settings: dict[str, Any]
) -> dict[str, Any]:
    """Writes what is beside the shards, and the description last."""
    splits, sizes, sums = {}, set(), []
    for split, shards in facts.items():
        labels = no_labels(source, sum(shard["examples"] for shard in shards))
        found = [label for shard in shards for label in shard["labels"]]
        labels[:] = np.asarray([np.nan if label is None else label for label in found], labels.dtype).reshape(
            labels.shape
        )
        file = f"{split}_labels.npy"
        with replacing(workdir / file) as temporary, temporary.open("wb") as stream:
            np.save(stream, labels)
        sizes |= {tuple(size) for shard in shards for size in shard["sizes"]}
        sums += [f"{shard['sha256']}  {shard['file']}\n" for shard in shards]
        splits[split] = {
            "examples": len(labels),
            "counts": _counts(source, labels),
            "labels": file,
            "shards": [{name: shard[name] for name in ("file", "examples", "bytes", "sha256")} for shard in shards],
            "left_out": [bad for shard in shards for bad in shard["left_out"]],
        }
    write_atomically(workdir / SUMS, "".join(sums))
    about = {
        "format": FORMAT,
        "class_names": source.class_names and list(source.class_names),
        "label_kind": source.label_kind,
        "picture_size": list(*sizes) if len(sizes) == 1 else None,
        **_describe_values(facts["train"] or facts["eval"]),
        "splits": splits,
        "settings": settings,
    }
    write_json(workdir / DESCRIPTION, finite_or_null(about))
    return about


def _counts(source: Source, labels: np.ndarray) -> dict[str, int] | None:
    """Pictures of each class; None if there are no classes."""
    if not source.num_classes or source.label_kind == "number":
        return None
    one_hot = source.label_kind == "multi"
    counts = np.nansum(labels, 0) if one_hot else np.bincount(labels[labels >= 0], minlength=source.num_classes)
    return dict(zip(source.class_names, map(int, counts), strict=True))


def _describe_values(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Types and channels of the pictures, and the statistics of the most frequent kind."""
    pictures, statistics = collections.Counter(), {}
    for shard in shards:
        kinds = {name: (name.split()[0], int(name.split()[1])) for name in shard["pictures"]}
        pictures.update({kind: shard["pictures"][name] for name, kind in kinds.items()})
        lists = shard["statistics"]
        merge_statistics(statistics, {kind: BandStatistics.from_lists(lists[name]) for name, kind in kinds.items()})
    merge_greys(pictures, statistics)
    dtype, channels = most_frequent(pictures)
    kinds = [{"dtype": kind[0], "channels": kind[1], "pictures": count} for kind, count in sorted(pictures.items())]
    more = statistics[dtype, channels].summary()
    return {"dtype": dtype, "channels": channels, "bands": None, "value_range": None, "kinds": kinds, **more}
