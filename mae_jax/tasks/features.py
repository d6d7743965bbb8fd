"""Writes the frozen features of all images to disk, for other programs."""

import contextlib
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import escaped
from mae_jax.runtime.processes import is_main
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.measuring import open_encoder, write_measurement
from mae_jax.workdir.writing import replacing


def run(config: ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Writes {train,eval}_features.npy [N, D] float32, {train,eval}_labels.npy [N] (-1: no label), and result.json.

    Without training images, earlier `train` files are removed. All files get their names when all are complete.
    """
    data, state = open_encoder(config, workdir, labelled=False)
    result, written = {"step": state.step}, []
    with contextlib.ExitStack() as files:
        for split, source in (("train", data.train), ("eval", data.evaluation)):
            if source is None:
                continue
            shape, out = (len(source), data.model.width), None
            if is_main():
                features = files.enter_context(replacing(workdir / f"{split}_features.npy"))
                out = np.lib.format.open_memmap(features, mode="w+", dtype=np.float32, shape=shape)
            _, labels = data.extract(state, source, out)
            if is_main():
                out.flush()
                with files.enter_context(replacing(workdir / f"{split}_labels.npy")).open("wb") as file:
                    np.save(file, labels)
            result[f"{split}_features"] = list(shape)
            written += [f"wrote {workdir}/{split}_{kind}.npy" for kind in ("features", "labels")]
        if data.train is None and is_main():
            for kind in ("features", "labels"):
                (workdir / f"train_{kind}.npy").unlink(missing_ok=True)
    say(*written)
    names = data.evaluation.class_names
    result["class_names"] = names and [escaped(name) for name in names]
    write_measurement(workdir, data.config, result | {"protocol": data.description})
    say(data.description)
