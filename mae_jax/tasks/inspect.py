"""The task inspect: a first look at data before training on them."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.data.inspecting import Findings, Look, describe_statistics, inspect
from mae_jax.data.loader import too_many_bad
from mae_jax.data.preparing import open_to_prepare
from mae_jax.data.sources import Source, Wrapper, describe_sources, random_subset
from mae_jax.data.statistics import STATISTICS
from mae_jax.evaluation.drawing import drawn_channels
from mae_jax.evaluation.overview import describe_crops, draw_crops, take_crops, to_display
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, escaped
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.settings.checks import check_colours
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import finite_or_null, save_picture, write_atomically, write_json

FILES = OVERVIEW, STATISTICS, CLASSES, LISTS = "overview.png", STATISTICS, "classes.csv", "files.csv"
SHOWN = 3  # slow and bad files that are printed
SHOWN_BANDS = 16


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Prints what the data hold and writes it to the workdir; nothing that could not be trained on is an error."""
    if config.data.name is None:
        raise UserError("data.name is not set: which pictures? For example --config.data.name=image_folder")
    if not is_main():
        return
    whole = open_to_prepare(config)
    say(*describe_sources(config.data.name, whole.get("train"), whole["eval"]))
    for name in (*FILES, "result.json"):  # of other data, perhaps
        (workdir / name).unlink(missing_ok=True)
    write_json(workdir / "config.json", config.to_dict() | provenance())
    classes = write_classes(workdir, whole)
    count = config.inspect.max_examples
    sources = {split: random_subset(source, count or len(source)) for split, source in whole.items()}
    found = inspect(sources, config.data, config.model.channels)
    statistics = describe_statistics(found, config.data)
    result = {"images": {split: len(source) for split, source in whole.items()}, "looked_at": len(found.looks)}
    result |= {
        "classes": classes,
        "bad": len(found.bad()),
        "sizes": describe_sizes(found),
        "kinds": list_kinds(found, sources),
    }
    write_files(workdir, found, sources)
    if statistics:
        write_json(workdir / STATISTICS, finite_or_null(statistics))
        say_values(statistics, workdir, config)
    draw_overview(config, workdir, found, sources)
    say_files(found, sources)
    write_json(workdir / "result.json", finite_or_null(result | {"statistics": statistics}))
    say(f"see {workdir}: {', '.join(name for name in FILES if (workdir / name).exists())}")


def write_classes(workdir: Path, sources: dict[str, Source]) -> int:
    """Writes classes.csv, and prints the classes with the fewest and the most pictures; returns their number."""
    source = next(iter(sources.values()))
    names = list(source.class_names or ()) if source.label_kind != "number" else []
    counts = {split: _count(sources[split], len(names)) for split in sources} if names else {}
    rows = [[escaped(name), *(int(counts[split][place]) if split in counts else 0 for split in ("train", "eval"))]
            for place, name in enumerate(names)]  # fmt: skip
    _write_csv(workdir / CLASSES, ("class", "training", "evaluation"), rows)
    if source.label_kind == "number" and source.num_classes:
        labels = source.labels()
        for place, name in enumerate(source.class_names):
            low, high = np.nanmin(labels[:, place]), np.nanmax(labels[:, place])
            say(f"number {escaped(name)}: from {low:g} to {high:g}, mean {np.nanmean(labels[:, place]):g}")
    elif not names:
        say("the pictures have no labels")
    else:
        ranked = sorted(rows, key=lambda row: row[1] if "train" in counts else row[2])
        column = 1 if "train" in counts else 2
        few, many = (f"{row[0]} ({row[column]:,})" for row in (ranked[0], ranked[-1]))
        say(f"{len(names):,} classes, from {few} to {many} {'training' if column == 1 else 'evaluation'} pictures")
    return len(names)


def _count(source: Source, classes: int) -> np.ndarray:
    labels = source.labels()
    if source.label_kind == "multi":
        return np.nansum(labels, 0)
    return np.bincount(labels[labels >= 0], minlength=classes)


def describe_sizes(found: Findings) -> dict[str, Any]:
    """Least, median and largest height, width and aspect; printed too."""
    looks = [look for look in found.looks if look.kind]
    if not looks:
        return {}
    sides = np.asarray([[look.height, look.width, look.width / look.height] for look in looks])
    low, middle, high = np.percentile(sides, (0, 50, 100), axis=0)
    say(
        "least, median and largest height {:.0f}, {:.0f}, {:.0f}; width {:.0f}, {:.0f}, {:.0f}; width / height {:.2f}, "
        "{:.2f}, {:.2f}".format(*np.stack([low, middle, high], 1).ravel())
    )
    return dict(zip(("height", "width", "aspect"), np.stack([low, middle, high], 1).tolist(), strict=True))


def list_kinds(found: Findings, sources: dict[str, Source]) -> list[dict[str, Any]]:
    """Type and channels, number of pictures and an example of each kind; printed too."""
    rows = []
    for (dtype, channels), count in found.kinds().most_common():
        name = _name(sources, found.example((dtype, channels)))
        rows.append({"dtype": dtype, "channels": channels, "pictures": count, "example": name})
        say(f"{count:,} pictures of {dtype} with {channels} channel{'s' * (channels != 1)}, such as {name}")
    return rows


def say_values(statistics: dict[str, Any], workdir: Path, config: ConfigDict) -> None:
    """Prints the values of each band, and the settings to copy."""
    raw = statistics["value_range"] is None and statistics["dtype"] != "uint8"
    for band, numbers in enumerate(zip(*(statistics[name] for name in ("min", "max", "mean", "std")), strict=True)):
        if band < SHOWN_BANDS:
            low, high, mean, std = numbers
            limits = "no values" if low is None else f"values from {low:g} to {high:g}"
            say(f"band {band}: {limits}, mean {mean:.4g}, std {std:.4g}{'' if raw else ' on [0, 1]'}")
    if statistics["no_data"]:
        say(f"{statistics['no_data']:.2%} of the values are NaN, no data")
    channels = statistics["channels"]
    more = f" --config.model.channels={channels}" if channels not in (1, config.model.channels) else ""
    say(f"to train with this mean and std: --config.data.statistics={workdir / STATISTICS}{more}")


def draw_overview(config: ConfigDict, workdir: Path, found: Findings, sources: dict[str, Source]) -> None:
    split = "train" if "train" in sources else "eval"
    usable, kind = found.usable(split), found.main_kind()
    if not usable:
        return say("no picture can be drawn")
    config = config.copy_and_resolve_references()
    data, channels = config.data, config.model.channels
    if data.bands is not None:
        channels = len(data.bands)
    elif not {channels, kind[1]} <= {1, 3}:
        channels = kind[1]
    data.dtype = data.dtype or kind[0]
    try:
        check_colours(data, channels)
    except UserError as error:
        say(f"note: {error}; {OVERVIEW} has the pictures' own")
        data.update(augmentation="none", color_jitter=0.0)
    try:
        shown = drawn_channels(config, channels)
    except UserError as error:
        say(f"note: {error}")
        config.evaluate.shown_channels = None
        shown = drawn_channels(config, channels)
    source = Wrapper(sources[split], np.asarray(usable))
    size, count = MAEConfig(**config.model).image_size, min(config.inspect.crops, len(usable))
    crops = take_crops(source, data, count, size, channels)
    pictures, how = to_display(crops["image"], shown)
    names = [_label(source, label) for label in crops["label"]]
    save_picture(workdir / OVERVIEW, draw_crops(pictures, names, [describe_crops(data), how]))


def _label(source: Source, label: np.ndarray) -> str:
    names = source.class_names
    if not names:
        return ""
    if source.label_kind == "class":
        return names[label] if label >= 0 else "no label"
    if source.label_kind == "multi":
        return ", ".join(name for name, value in zip(names, label, strict=True) if value == 1)
    return ", ".join(f"{name} {value:g}" for name, value in zip(names, label, strict=True))


def write_files(workdir: Path, found: Findings, sources: dict[str, Source]) -> None:
    """Writes files.csv: the slowest, the largest and all bad files."""
    rows = [
        [why, _name(sources, look), look.split, f"{look.milliseconds:.2f}", look.file_bytes, look.height, look.width,
         look.why]
        for why, looks in (("slow", found.slowest()), ("large", found.largest()), ("bad", found.bad()))
        for look in looks
    ]  # fmt: skip
    _write_csv(workdir / LISTS, ("list", "file", "split", "ms", "bytes", "height", "width", "reason"), rows)


def say_files(found: Findings, sources: dict[str, Source]) -> None:
    slow = [f"{_name(sources, look)} ({look.milliseconds:.0f} ms)" for look in found.slowest()[:SHOWN]]
    if slow:
        typical = np.median([look.milliseconds for look in found.looks if look.kind])
        say(f"slowest to decode: {', '.join(slow)}; the median is {typical:.1f} ms")
    for look in found.bad()[:SHOWN]:
        say(f"bad: {_name(sources, look)}: {look.why}")
    if bad := len(found.bad()):
        total = len(found.looks)
        stops = "more than a run replaces by others (1 %)" if too_many_bad(bad, total, total) else "a run replaces them"
        say(f"{bad:,} of {total:,} pictures are bad ({stops}); files.csv has all")


def _name(sources: dict[str, Source], look: Look) -> str:
    return escaped(sources[look.split].name_of(look.index))


def _write_csv(path: Path, header: Sequence[str], rows: list[list]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue())
