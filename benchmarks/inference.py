"""The forward pass beside transformers': `python -m benchmarks.inference [--against=transformers] [--out=FILE.md]`.

The table that Hugging Face's page of ViTMAE shows: ViT-MAE-base with decoder and loss, for batches of 1 to 32 images. A
time is that of one call, from pictures that lie on the device until the result is there: the median (least, greatest)
of turns that the programs take, each in a process of its own. All have the same weights, pictures and masks. Before
they are timed, their predictions are compared: in float32 they must agree.

"float32" means products of float32 in both programs, without TensorFloat-32. bfloat16 is timed where the chip has it,
and every back-end of attention on accelerators. A program that fails has the reason in its cell.

On a CPU that other programs use, too, `taskset -c 0 python -m benchmarks.inference --clock=processor` gives the
processor's time instead: their share of the core does not count.
"""

import argparse
import contextlib
import dataclasses
import datetime
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed_table import versions
from benchmarks.turns import Turn, Worker, spread, take_turns

BATCHES = (1, 2, 4, 8, 32)
OTHERS = ("eager", "sdpa")  # attention of transformers; outputs are compared with the first that works
LIMIT = 1e-4  # of differences in float32, relative to the largest value
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # two programs share a GPU's memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", choices=("transformers",))
    parser.add_argument("--model", type=Path, help="folder of transformers; default: ViT-MAE-base with random weights")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each program")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a turn")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="time of all threads; see above")
    parser.add_argument("--out", type=Path, help="file to write the table to, too")
    arguments = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        for line in table(arguments, Path(scratch)):
            print(line, flush=True)
            lines.append(line)
            if arguments.out:  # after each line: a row takes a minute
                arguments.out.write_text("\n".join(lines) + "\n")


def table(arguments: argparse.Namespace, scratch: Path, start: Callable[..., Worker] = Worker) -> Iterator[str]:
    """The lines of the document, each when it is known; `start` starts a program."""
    folder = arguments.model or scratch / "model"
    facts = run_once(start, Setup, folder, arguments.model is None)
    programs = {f"mae_jax, {attention}": (Ours, attention) for attention in facts["attention"]}
    if arguments.against:
        programs |= {f"transformers, {attention}": (Theirs, attention) for attention in OTHERS}
    command = shlex.join(["python", "-m", "benchmarks.inference", *sys.argv[1:]])
    about = f"{datetime.date.today()}, {versions()}; {facts['device']}; medians of {arguments.rounds} turns"
    yield f"`{command}`, {about}\n"
    yield f"| batch | precision | {' | '.join(f'{name}, ms' for name in programs)} | ratio | difference |"
    yield "|--:|---|" + "--:|" * (len(programs) + 2)
    for dtype in facts["dtypes"]:
        for batch in arguments.batch:
            row = measure(programs, (folder, batch, dtype), arguments, start)
            yield f"| {batch} | {dtype} | {' | '.join(describe(row, programs))} |"


def run_once(start: Callable[..., Worker], make: Callable, *arguments) -> dict[str, Any]:
    """The facts of a work that is only made, in a process that ends, so that this one holds no device."""
    worker = start(make, *arguments)
    worker.close()
    return worker.facts


class Row(NamedTuple):
    """What was measured for one batch and precision."""

    times: dict[str, Any]  # program -> Spread of its seconds
    failed: dict[str, str]  # program -> why it has none
    difference: float | None  # the greatest of ours from transformers'


def measure(
    programs: dict[str, tuple[Callable, str]], case: tuple, arguments: argparse.Namespace, start: Callable[..., Worker]
) -> Row:
    """Compares and times the programs for a case: (folder, batch, dtype)."""
    workers, failed, differences = {}, {}, {}
    with contextlib.ExitStack() as stack:  # whatever happens, their memory is free for the next ones
        for name, (make, attention) in programs.items():
            try:
                worker = start(make, *case, attention, environment=ENVIRONMENT)
            except RuntimeError as error:  # the words of the process that failed
                failed[name] = str(error).splitlines()[0].replace("|", "/")
                continue
            stack.callback(worker.close)
            workers[name] = worker
        if reference := next((worker for name, worker in workers.items() if programs[name][0] is Theirs), None):
            differences = {name: difference(worker, reference) for name, worker in workers.items()}
            for name in [name for name, found in differences.items() if case[2] == "float32" and not found <= LIMIT]:
                failed[name] = f"its prediction differs by {differences[name]:.1e} of the largest value"
                del workers[name]
        turns = take_turns(workers, arguments.rounds, arguments.seconds)
    if arguments.clock == "processor":
        turns = {name: [Turn(turn.seen["processor_seconds"], {}) for turn in found] for name, found in turns.items()}
    ours = [found for name, found in differences.items() if programs[name][0] is Ours]
    return Row({name: spread(found) for name, found in turns.items()}, failed, max(ours, default=None))


def difference(worker: Worker, reference: Worker) -> float:
    """The greatest of loss and prediction, relative to the largest value of each."""
    pairs = zip(worker.facts["output"], reference.facts["output"], strict=True)
    return float(np.max([np.max(np.abs(found - expected)) / np.max(np.abs(expected)) for found, expected in pairs]))


def describe(row: Row, programs: dict[str, tuple[Callable, str]]) -> Iterator[str]:
    """A row's cells after batch and precision. The ratio is that of the fastest of both libraries."""
    for name in programs:
        if name in row.times:
            median, least, greatest = (1000 * value for value in row.times[name])
            yield f"{median:,.1f} ({least:,.1f}, {greatest:,.1f})"
        else:
            yield f"failed: {row.failed[name]}"
    ours, theirs = (
        [found.median for name, found in row.times.items() if programs[name][0] is make] for make in (Ours, Theirs)
    )
    yield f"{min(theirs) / min(ours):.2f}" if ours and theirs else ""
    yield "" if row.difference is None else f"{row.difference:.1e}"


class Setup:
    """Work that tells what this machine can do, and writes the random model."""

    def __init__(self, folder: Path, write: bool):
        import jax

        from mae_jax.models.config import CHOICES, MAEConfig
        from mae_jax.runtime.mesh import fitting_dtype

        if write:
            write_random(folder, MAEConfig(norm_epsilon=1e-12, normalize_targets=False))  # as facebook/vit-mae-base
        device = jax.devices()[0]
        self.facts = {
            "device": f"{jax.device_count()} x {device.device_kind}",
            "dtypes": tuple(dict.fromkeys(("float32", fitting_dtype(device)))),
            "attention": ("xla",) if device.platform == "cpu" else tuple(filter(None, CHOICES["attention"])),
        }

    def __call__(self, count: int) -> dict:
        return {}


def write_random(folder: Path, model: Any) -> None:
    """A folder for transformers and for us, with initial values; transformers' own have neither positions nor tokens.

    Args:
      model: a MAEConfig.
    """
    import jax

    from configs.common import get_config
    from mae_jax.interop.formats import export
    from mae_jax.interop.workdirs import Weights
    from mae_jax.models.mae import init_params

    config = {"task": "pretrain", "model": dataclasses.asdict(model), "data": get_config().data.to_dict()}
    params = jax.tree.map(np.asarray, init_params(model, jax.random.key(0)))
    export(Weights(config, params, 0, "random"), folder, "huggingface")


def inputs(batch: int, size: tuple[int, int], channels: int, num_patches: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures [B, H, W, C] and noise [B, L], the same for all programs."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, *size, channels), np.float32), rng.random((batch, num_patches), np.float32)


class Forward:
    """Work that is one call of a model, `_run`, which waits for the result."""

    def __call__(self, count: int) -> dict[str, float]:
        start = time.process_time()
        for _ in range(count):
            self._run()
        return {"processor_seconds": (time.process_time() - start) / count}


class Ours(Forward):
    """A model from `mae_jax.load`, compiled as the README says."""

    def __init__(self, folder: Path, batch: int, dtype: str, attention: str):
        import jax

        import mae_jax

        self._jax, self._model = jax, mae_jax.load(folder, dtype=dtype, attention=attention)
        config = self._model.config
        self._inputs = jax.device_put(inputs(batch, config.image_size, config.channels, config.num_patches))

        @jax.jit
        def forward(model, images, noise):
            with jax.default_matmul_precision("float32" if dtype == "float32" else None):
                output = model(images, noise=noise)
            return output.loss, output.prediction

        self._forward = forward
        self.facts = {"output": tuple(map(np.asarray, self._run()))}

    def _run(self):
        return self._jax.block_until_ready(self._forward(self._model, *self._inputs))


class Theirs(Forward):
    """The same of transformers, in evaluation mode and without gradients; `attention`: eager or sdpa."""

    def __init__(self, folder: Path, batch: int, dtype: str, attention: str):
        import torch
        from transformers import ViTMAEForPreTraining
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        self._torch = torch
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ViTMAEForPreTraining.from_pretrained(folder, attn_implementation=attention)
        self._model = model.eval().to(device, getattr(torch, dtype))
        side, patches = model.config.image_size, model.vit.embeddings.patch_embeddings.num_patches
        images, noise = inputs(batch, (side, side), model.config.num_channels, patches)
        images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self._images, self._noise = images.to(device, getattr(torch, dtype)), torch.from_numpy(noise).to(device)
        output = self._run()
        self.facts = {"output": tuple(x.float().cpu().numpy() for x in (output.loss, output.logits))}

    def _run(self):
        with self._torch.inference_mode():
            output = self._model(self._images, noise=self._noise)
        if self._images.is_cuda:
            self._torch.cuda.synchronize()
        return output


if __name__ == "__main__":
    main()
