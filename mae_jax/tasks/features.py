"""Frozen features of every image, written to disk for other programs."""

from pathlib import Path

import ml_collections
import numpy as np

from mae_jax.evaluation.representations import describe_features
from mae_jax.tasks.frozen import FrozenEncoder
from mae_jax.training.reporting import write_json
from mae_jax.training.signals import StopSignal


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes {train,eval}_features.npy [N, D] float32, {train,eval}_labels.npy [N], and result.json.

    Each file is whole when it has its name. Features go to the disk as they come, so that they need no memory.

    Raises:
      UserError: without a checkpoint.
    """
    frozen = FrozenEncoder(config, workdir)
    result = {"step": frozen.step}
    for split, source in (("train", frozen.train_source), ("eval", frozen.eval_source)):
        features_path, labels_path = workdir / f"{split}_features.npy", workdir / f"{split}_labels.npy"
        temporary = workdir / f"{split}_features.npy.tmp"
        shape = (len(source), frozen.model.width)
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        _, labels = frozen.extract(source, out)
        out.flush()
        del out
        temporary.replace(features_path)
        temporary = labels_path.with_name(labels_path.name + ".tmp")
        with temporary.open("wb") as file:
            np.save(file, labels)
        temporary.replace(labels_path)
        result[f"{split}_features"] = list(shape)
        print(f"{features_path}: {shape[0]:,} x {shape[1]}")
    result["class_names"] = frozen.train_source.class_names
    result["protocol"] = describe_features(frozen.config.evaluate, len(frozen.train_source), len(frozen.eval_source))
    write_json(workdir / "result.json", result)
    print(result["protocol"])
