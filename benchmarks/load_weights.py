"""Time and memory of loading a Hugging Face folder: `python -m benchmarks.load_weights [--model=large] [--rounds=7]`.

Against transformers, on the same file of random weights, in turns. transformers maps the file and reads nothing until a
weight is used, and we bring every weight into our layout; so both are timed twice: until the model is there, and until
every weight was read once (a sum). Where fresh memory is dear (a virtual machine that gives freed memory back to its
host), that is most of our time: the third row shows it. The memory is that of a process that only loads, with the pages
of the mapped file that it has touched.
"""

import argparse
import dataclasses
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import numpy as np

import mae_jax
from mae_jax.interop.formats import export
from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.models.mae import abstract_params

GB = 1e9


def load_ours(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return jax.block_until_ready(mae_jax.load(folder))


def sum_ours(model) -> float:
    return sum(float(leaf.sum()) for leaf in jax.tree.leaves(model))


def load_theirs(folder: Path):
    from transformers import ViTMAEForPreTraining, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return ViTMAEForPreTraining.from_pretrained(folder)


def sum_theirs(model) -> float:
    return sum(float(parameter.detach().sum()) for parameter in model.parameters())


PROGRAMS = {"mae_jax": (load_ours, sum_ours), "transformers": (load_theirs, sum_theirs)}


def write_random_model(size: str, folder: Path) -> None:
    """A folder as `configs/export.py` writes it."""
    model, rng = MAEConfig(**SIZES[size]), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), abstract_params(model))
    config = {
        "task": "pretrain",
        "model": dataclasses.asdict(model),
        "data": {"name": None, "mean": (0.5,), "std": (0.5,), "eval_crop": 1.0},
    }
    export(Weights(config, params, 0, "random"), folder, "huggingface")


def measure_memory(program: str, folder: str) -> None:
    """Prints the peak of this process's resident memory, before and after it has loaded and used the model."""
    load, total = PROGRAMS[program]
    with tempfile.TemporaryDirectory() as small:
        write_random_model("tiny", Path(small))
        total(load(Path(small)))
    before = peak_memory()
    model = load(Path(folder))
    loaded = peak_memory()
    total(model)
    print(json.dumps([before, loaded, peak_memory()]))


def peak_memory() -> int:
    """Bytes, of this program alone (what getrusage tells has the parent's peak in it)."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.3f} s [{min(seconds):.3f}, {max(seconds):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="large")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_random_model(args.model, Path(folder))
        file_size = (Path(folder) / "model.safetensors").stat().st_size
        print(f"ViT {args.model}: {file_size / GB:.3f} GB, {args.rounds} rounds in turns, medians [least, most]")
        times: dict[str, list[tuple[float, ...]]] = {name: [] for name in (*PROGRAMS, "memory")}
        for round_ in range(args.rounds + 1):
            for name, (load, total) in PROGRAMS.items():
                start = time.perf_counter()
                model = load(Path(folder))
                loaded = time.perf_counter() - start
                total(model)
                used = time.perf_counter() - start
                del model
                if round_:  # the first is for what is imported and compiled once
                    times[name].append((loaded, used))
            start = time.perf_counter()
            np.empty(file_size, np.uint8).fill(1)
            times["memory"].append((time.perf_counter() - start,))
        for column, what in enumerate(("until the model is there", "until every weight was read once")):
            ours, theirs = ([row[column] for row in times[name]] for name in PROGRAMS)
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            print(f"  {what:<34}mae_jax {spread(ours)}   transformers {spread(theirs)}   ratio {ratio:.2f}")
        print(f"  {'to fill as much fresh memory':<34}{spread([row[0] for row in times['memory']])}")
        for name in PROGRAMS:
            command = [
                sys.executable,
                "-c",
                f"from benchmarks.load_weights import *; measure_memory({name!r}, {folder!r})",
            ]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            before, loaded, used = json.loads(found.splitlines()[-1])
            there, used = ((value - before) / file_size for value in (loaded, used))
            text = f"{there:.2f} x the file when the model is there, {used:.2f} x when it was used"
            print(f"  {name:<14}peak memory: {text}")


if __name__ == "__main__":
    main()
