"""Frozen features of every image, written to disk for other programs."""

import contextlib
from pathlib import Path

import ml_collections
import numpy as np

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import escaped
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.frozen import open_encoder
from mae_jax.tasks.measuring import write_measurement
from mae_jax.workdir.writing import replacing


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes {train,eval}_features.npy [N, D] float32, {train,eval}_labels.npy [N] (-1: no label), and result.json.

    A folder without training images gives `eval` files alone; `train` files of an earlier measurement are removed.
    Features go to the disk as they are computed, and get their names when all are complete.

    Raises:
      UserError: without a checkpoint.
    """
    data, state = open_encoder(config, workdir, labelled=False)
    result, written = {"step": state.step}, []
    with contextlib.ExitStack() as files:
        for split, source in (("train", data.train), ("eval", data.evaluation)):
            if source is None:
                continue
            shape, out = (len(source), data.model.width), None
            if is_main():
                written += [workdir / f"{split}_{kind}.npy" for kind in ("features", "labels")]
                features, labels = (files.enter_context(replacing(path)) for path in written[-2:])
                out = np.lib.format.open_memmap(features, mode="w+", dtype=np.float32, shape=shape)
            _, found = data.extract(state, source, out)
            if is_main():
                out.flush()
                with labels.open("wb") as file:
                    np.save(file, found)
            result[f"{split}_features"] = list(shape)
        if data.train is None and is_main():
            for path in workdir.glob("train_[fl]*.npy"):
                path.unlink()
    for path in written:
        say(f"wrote {path}")
    names = data.evaluation.class_names
    result["class_names"] = names and [escaped(name) for name in names]
    write_measurement(workdir, data.config, result | {"protocol": data.description})
    say(data.description)
