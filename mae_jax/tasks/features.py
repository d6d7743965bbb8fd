"""The task features: a frozen encoder's features of each picture, as a table or as arrays."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mae_jax.evaluation.each_picture import features_of_each
from mae_jax.evaluation.evaluator import EvaluationData, Trained
from mae_jax.evaluation.feature_table import TABLE, describe_encoder, writing_features
from mae_jax.interop.weights import choose
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import escaped
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import find_sources, open_checkpoint, open_data, write_measurement
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import replacing, write_json

SHOWN_BAD = 3


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes the features of both splits, once for each of `features.image_sizes`, and result.json."""
    weights, config = open_checkpoint(config, workdir)
    write_json(workdir / "config.json", config.to_dict() | provenance())
    result, files, sizes = {"step": weights.step}, [], config.features.image_sizes
    for size in sizes or [config.model.image_size]:
        chosen = choose(weights, {"image_size": size}) if sizes else weights
        sized = ConfigDict(config.to_dict() | {"model": config.model.to_dict() | {"image_size": size}})
        data, state = open_data(chosen, sized, *find_sources(chosen, sized))
        ending = "_" + "x".join(map(str, np.ravel(size))) if sizes else ""
        write = write_table if config.features.format == "parquet" else write_arrays
        found, written = write(data, state, workdir, ending)
        result |= found
        files += written
    names = data.evaluation.class_names
    result |= {"class_names": names and [escaped(name) for name in names], "protocol": data.description}
    write_measurement(workdir, config, result)
    say(data.description, *(f"wrote {workdir}/{file}" for file in files))


def splits_of(data: EvaluationData) -> list[tuple[str, Any]]:
    return [(split, source) for split, source in (("train", data.train), ("eval", data.evaluation)) if source]


def write_table(data: EvaluationData, state: Trained, workdir: Path, ending: str) -> tuple[dict[str, Any], list[str]]:
    """Writes features{ending}.parquet while pictures are read; bad ones are left out and told."""
    name, settings = TABLE.replace(".", ending + "."), data.config
    patches = (data.model.num_patches,) if settings.evaluate.token == "patches" else ()
    about = describe_encoder(settings, state.step)
    counts, left_out = {}, []
    source = data.evaluation if data.evaluation.num_classes or data.train is None else data.train
    with writing_features(workdir / name, source, (*patches, data.model.width), about) as write_rows:
        for split, source in splits_of(data):
            pictures = features_of_each(data, state, source)
            for index, (features, labels) in pictures:
                write_rows(split, source, index, labels, features)
            counts[split] = len(source) - len(pictures.bad)
            for index, why in sorted(pictures.bad.items()):
                left_out.append({"file": escaped(source.file_of(index)), "split": split, "error": escaped(why)})
    for bad in left_out[:SHOWN_BAD]:
        say(f"bad: {bad['file']}: {bad['error']}")
    if left_out:
        say(f"{len(left_out):,} bad pictures are left out; result.json names them")
    return {f"images{ending}": counts, f"left_out{ending}": left_out}, [name]


def write_arrays(data: EvaluationData, state: Trained, workdir: Path, ending: str) -> tuple[dict[str, Any], list[str]]:
    """Writes {train,eval}_features{ending}.npy float32 [N, ...] and {train,eval}_labels{ending}.npy, all or none.

    Labels are `Source.labels`; bad pictures are replaced, as in training.
    """
    result, written = {}, []
    patches = (data.model.num_patches,) if data.config.evaluate.token == "patches" else ()
    with contextlib.ExitStack() as files:
        for split, source in splits_of(data):
            shape, out = (len(source), *patches, data.model.width), None
            names = [f"{split}_{kind}{ending}.npy" for kind in ("features", "labels")]
            if is_main():
                features = files.enter_context(replacing(workdir / names[0]))
                out = np.lib.format.open_memmap(features, mode="w+", dtype=np.float32, shape=shape)
            _, labels = data.extract(state, source, out)
            if is_main():
                out.flush()
                with files.enter_context(replacing(workdir / names[1])).open("wb") as file:
                    np.save(file, labels)
            result[f"{split}_features{ending}"] = list(shape)
            written += names
        if data.train is None and is_main():
            for kind in ("features", "labels"):
                (workdir / f"train_{kind}{ending}.npy").unlink(missing_ok=True)
    return result, written
