"""The table of speeds in docs/performance.md: `python -m benchmarks.speed_table [--against=torch] [--out=FILE.md]`.

On an accelerator: ViT-B, L and H as configured, then with one setting changed at a time, each by
`benchmarks.train_step` in processes of its own; then the fastest of each model again, with --against=torch in turns
with PyTorch. A variant that fails, for want of memory or another reason, has the reason in its row. On a CPU: a model
that shows that the program works.
"""

import argparse
import datetime
import importlib.metadata
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import train_step
from benchmarks.train_step import MODELS

LARGE = ("vit_base", "vit_large", "vit_huge")
SMALL = {"model.image_size": 32, "model.depth": 2, "model.decoder_depth": 1}  # settings of `tiny` on a CPU
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
HEADER = (
    "| model | batch | variant | images/s | step ms (least, most) | TFLOP/s | share of matmul rate | peak MiB "
    "| compile s | PyTorch images/s | ratio |\n|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)
Measure = Callable[[argparse.Namespace], dict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", choices=("torch",))
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: " + ", ".join(LARGE) + "; tiny on a CPU")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--seconds", type=float, default=3.0, help="least time of a turn")
    parser.add_argument("--out", type=Path, help="file to write the table to, too")
    arguments = parser.parse_args()
    accelerated = train_step.has_accelerator()
    models = arguments.models or (LARGE if accelerated else ("tiny",))
    lines = []
    for line in table(models, accelerated, arguments.against, arguments.rounds, arguments.seconds):
        print(line, flush=True)
        lines.append(line)
        if arguments.out:  # after each line: a row takes minutes
            arguments.out.write_text("\n".join(lines) + "\n")


def table(
    models, accelerated: bool, against: str | None, rounds: int, seconds: float, measure: Measure = train_step.measure
) -> Iterator[str]:
    """The lines of the document, each when it is known."""
    command = shlex.join(["python", "-m", "benchmarks.speed_table", *sys.argv[1:]])
    yield f"`{command}`, {datetime.date.today()}, {versions()}; medians of {rounds} turns\n\n{HEADER}"
    device = None
    for model in models:
        found = []
        for name, batch, settings in variants(model, accelerated):
            row = try_variant(measure, model, batch, settings, None, rounds, seconds)
            found += [] if "error" in row else [(row["images_per_second"], name, batch, settings)]
            device = device or row.get("device")
            yield describe(model, batch, name, row)
        if against and found:
            _, name, batch, settings = max(found, key=lambda variant: variant[0])
            row = try_variant(measure, model, batch, settings, against, rounds, seconds)
            yield describe(model, batch, f"{name}, beside PyTorch", row)
    yield f"\n{device or 'no variant ran'}"


def variants(model: str, accelerated: bool) -> list[tuple[str, int, dict[str, Any]]]:
    """(name, batch, settings) of a model's rows: the usual one, and those that differ from it in one respect."""
    config, cpu_batch, batch = MODELS[model]
    base = {} if accelerated or model != "tiny" else SMALL
    batch = batch if accelerated else cpu_batch
    changes = [("usual", 1, {})]
    if accelerated:
        changes += [(f"{attention} attention", 1, {"model.attention": attention}) for attention in ("cudnn", "xla")]
    changes += [("in loops", 1, {"model.scan_unroll": 1}), ("remat", 1, {"model.remat": True})]
    changes += [("half the batch", 0.5, {}), ("twice the batch", 2, {})]
    return [(name, int(batch * factor), base | settings) for name, factor, settings in changes]


def try_variant(measure: Measure, model: str, batch: int, settings: dict, against, rounds: int, seconds: float) -> dict:
    """The numbers of a row, or {"error": why there are none}."""
    asked = argparse.Namespace(
        model=model, batch=batch, against=against, torch_compile=False, rounds=rounds, seconds=seconds,
        set=[f"{key}={value}" for key, value in settings.items()], json=None,
    )  # fmt: skip
    try:
        measured = measure(asked)
    except RuntimeError as error:  # the words of the process that failed
        return {"error": str(error).splitlines()[0]}
    ours = measured["programs"]["mae_jax"]
    device = f"{ours['devices']} x {ours['device']}, {ours['matmul_tflops']:.3g} TFLOP/s in large matrix products"
    return measured | {"ours": ours, "device": device}


def describe(model: str, batch: int, name: str, row: dict) -> str:
    """A line of the table."""
    head = f"| {model} | {batch} | {name} |"
    if "error" in row:
        return f"{head} failed: {row['error'].replace('|', '/')} | | | | | | | |"
    ours = row["ours"]
    step = [1000 * ours["step_seconds"][key] for key in ("median", "least", "greatest")]
    theirs = f"{row['torch_images_per_second']:,.0f} | {row['ratio']:.2f}" if "ratio" in row else " | "
    if row["failed"]:
        theirs += f" (failed: {', '.join(row['failed'])})"
    return (
        f"{head} {row['images_per_second']:,.0f} | {step[0]:,.1f} ({step[1]:,.1f}, {step[2]:,.1f}) "
        f"| {row['tflops_per_second']:.3g} | {row['matmul_share']:.0%} | {ours['peak_memory_bytes'] / 2**20:,.0f} "
        f"| {ours['compile_seconds']:.0f} | {theirs} |"
    )


def versions() -> str:
    """Names and versions of the packages that count."""
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()
