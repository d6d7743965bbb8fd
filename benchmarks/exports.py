"""Time and size of every export, and exported programs beside the model: `python -m benchmarks.exports [--size=base]`.

An autoencoder and a classifier of 1,000 classes with initial weights are written in every format. Programs then run on
the same photographs (--pictures=FOLDER; without it, on noise), in JAX and in onnxruntime, in turns with the model.
Times are seconds of the processor, all threads together, since other programs may keep the machine busy.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import onnxruntime

from configs.common import get_config, vit
from mae_jax.data.augment import normalize
from mae_jax.interop.formats import FORMATS, PROGRAMS, export
from mae_jax.interop.programs import ABOUT, picture_processor, programs_of
from mae_jax.interop.weights import make_bind_of
from mae_jax.interop.workdirs import Weights
from mae_jax.models.classifier import init_classifier, make_classifier_config
from mae_jax.models.config import MAEConfig
from mae_jax.models.mae import init_params
from mae_jax.settings.fields import use_defaults

CLASSES = 1000


def random_weights(size: str) -> dict[str, Weights]:
    """An autoencoder and a classifier with initial weights; the head's are larger, for logits of an ordinary size."""
    config, key = vit(size).to_dict(), jax.random.key(0)
    config["model"] = dataclasses.asdict(MAEConfig(**config["model"]))
    params = {"autoencoder": init_params(MAEConfig(**config["model"]), key)}
    config["classifier"] |= {"num_classes": CLASSES, "head_std": 0.02}
    params["classifier"], _ = init_classifier(make_classifier_config(config["model"], config["classifier"]), key)
    tasks = {"autoencoder": "pretrain", "classifier": "classify"}
    return {
        name: Weights(config | {"task": tasks[name]}, jax.tree.map(np.asarray, params[name]), 0, "random")
        for name in tasks
    }


def seconds_in_turns(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """The median processor time of each of the functions, after a first call that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            jax.block_until_ready(run())
            if turn:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def compare(weights: Weights, folders: dict[str, Path], batch: int, pictures: Path | None, rounds: int) -> None:
    """Prints a row for each program and runtime: the largest difference from the model's outputs, and the time."""
    processor, model = picture_processor(weights), MAEConfig(**weights.config["model"])
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, *model.image_size, model.channels), np.uint8)
    if pictures:
        files = sorted(file for file in pictures.rglob("*") if file.is_file())[:: max(1, 256 // batch)][:batch]
        raw = dataclasses.replace(processor, mean=(0.0,), std=(1.0,))
        images = np.rint(np.asarray(raw(files)) * 255).astype(np.uint8)
    bound = make_bind_of(weights)(jax.device_put(weights.params))
    for program in programs_of(weights):
        inputs = {"pictures": images}
        if "noise" in program.inputs:
            inputs["noise"] = rng.random((len(images), model.num_patches), np.float32)

        def run_model(pictures, *others, program=program):
            return program.call(bound, normalize(pictures, processor), *others)

        compiled = jax.jit(run_model)
        exported = jax.jit(
            jax.export.deserialize((folders["stablehlo"] / f"{program.name}.stablehlo").read_bytes()).call
        )
        session = onnxruntime.InferenceSession(folders["onnx"] / f"{program.name}.onnx")
        runs = {
            "the model": lambda inputs=inputs, fn=compiled: fn(*inputs.values()),
            "stablehlo": lambda inputs=inputs, fn=exported: fn(*inputs.values()),
            "onnx": lambda inputs=inputs, session=session: session.run(None, inputs),
        }
        seconds, expected = seconds_in_turns(runs, rounds), jax.tree.leaves(runs["the model"]())
        for name, run in runs.items():
            pairs = list(zip(jax.tree.leaves(run()), expected, strict=True))
            apart = max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs)
            largest = max(float(np.max(np.abs(b))) for b in expected)
            per_picture = 1000 * seconds[name] / len(images)
            print(f"{program.name:<15}{name:<11}{per_picture:8.1f} CPU ms/picture  apart {apart:.1e} of {largest:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=Path)
    arguments = parser.parse_args()
    use_defaults(get_config)
    for name, weights in random_weights(arguments.size).items():
        with tempfile.TemporaryDirectory() as folder:
            folders = {format: Path(folder, format) for format in FORMATS}
            for format, place in folders.items():
                start = time.process_time()
                files = [file for file in export(weights, place, format) if file.suffix != ".json"]
                seconds = time.process_time() - start
                sizes = ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in files)
                print(f"{name:<13}{format:<12}{seconds:6.1f} CPU s  {sizes}", flush=True)
            assert all((folders[format] / ABOUT).is_file() for format in PROGRAMS)
            compare(weights, folders, arguments.batch, arguments.pictures, arguments.rounds)


if __name__ == "__main__":
    main()
