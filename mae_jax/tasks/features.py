"""Frozen features of every image, written to disk for other programs."""

import contextlib
from pathlib import Path

import ml_collections
import numpy as np

from mae_jax.evaluation.representations import describe_features
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import escaped
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.frozen import FrozenEncoder
from mae_jax.tasks.measuring import write_measurement
from mae_jax.workdir.writing import replacing


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes {train,eval}_features.npy [N, D] float32, {train,eval}_labels.npy [N], and result.json.

    A folder that is measured whole gives only `eval` files, and `train` files of an earlier measurement are removed.
    Files get their names when all are whole. Features go to the disk as they come, so that they need no memory; labels
    of pictures without any are -1.

    Raises:
      UserError: without a checkpoint.
    """
    frozen = FrozenEncoder(config, workdir, labelled=False)
    result, written = {"step": frozen.step}, {}
    with contextlib.ExitStack() as files:
        for split, source in (("train", frozen.train_source), ("eval", frozen.eval_source)):
            if source is None:
                continue
            shape = (len(source), frozen.model.width)
            features, labels = (workdir / f"{split}_{kind}.npy" for kind in ("features", "labels"))
            if is_main():
                written |= {path: files.enter_context(replacing(path)) for path in (features, labels)}
                out = np.lib.format.open_memmap(written[features], mode="w+", dtype=np.float32, shape=shape)
                _, found = frozen.extract(source, out)
                out.flush()
                with written[labels].open("wb") as file:
                    np.save(file, found)
            else:
                frozen.extract(source)
            result[f"{split}_features"] = list(shape)
        if frozen.train_source is None and is_main():
            for kind in ("features", "labels"):
                (workdir / f"train_{kind}.npy").unlink(missing_ok=True)
    for path in written:
        say(f"wrote {path}")
    names = frozen.eval_source.class_names
    result["class_names"] = names and [escaped(name) for name in names]
    result["protocol"] = describe_features(frozen.config.evaluate, frozen.train_source, frozen.eval_source)
    write_measurement(workdir, frozen.config, result)
    say(result["protocol"])
