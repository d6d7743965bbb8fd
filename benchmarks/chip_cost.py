"""What a program costs on a chip that is not here: `python -m benchmarks.chip_cost --chip=h200 --model=vit_base`.

Compiles the step of a config for a GPU or TPU (or, with --what, the features of its encoder or its reconstructions),
without one, and reads the compiler's text: each kernel's bytes and FLOPs, the time that they take at least (GPU: a
roofline; TPU: the compiler's own cycles), and the ten dearest with the line of our code that they come from. Nothing
is measured: compare programs by it. With --against=plain, the control in `benchmarks.plain_step` is compiled with the
same options. Needs the compiler's package: jax-cuda12-pjrt, or libtpu.
"""

import argparse
import functools
import json
import re
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict

import mae_jax
from benchmarks.jax_step import read_config
from benchmarks.train_step import parse_setting
from mae_jax.evaluation.evaluator import pool
from mae_jax.objectives.objective import OBJECTIVES, Objective
from mae_jax.runtime import hlo
from mae_jax.runtime.chips import CHIPS, GPUS, Chip
from mae_jax.runtime.cost import Kernel, read_kernels, totals
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import lowering_for, make_mesh
from mae_jax.runtime.seeds import make_key
from mae_jax.runtime.sharding import on_rows
from mae_jax.training.plan import compile_train_step, devices_for, make_plan, memory_in_bytes

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # the smallest whole hosts; a GPU is alone
BATCHES = {"base": 512, "large": 256, "huge": 128}  # of a GPU
TPU_BATCH = 128  # of a chip
OURS = Path(mae_jax.__file__).parents[1]  # where the code lies
NOT_OURS = {"site-packages", "chip_cost.py"}
DEAREST = 10


class Program(NamedTuple):
    """A compiled program, read."""

    name: str
    module: hlo.Module
    kernels: list[Kernel]
    memory: int  # bytes of one device
    seconds: float  # to compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="h200", choices=[*CHIPS, "a100"], help="a100 is a100-80")
    parser.add_argument("--model", default="vit_base", help="base, large, huge, or a file of configs/ that trains")
    parser.add_argument("--batch", type=int, help="images of one chip; default: 512, 256, 128 for B, L, H; a TPU's 128")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings: model.remat=True ...")
    parser.add_argument("--what", default="step", choices=("step", "features", "reconstruct"))
    parser.add_argument("--against", choices=("plain",), help="the control beside it (benchmarks/plain_step.py)")
    parser.add_argument("--gemm", default="cublas", choices=("cublas", "triton"), help="what multiplies on a GPU")
    parser.add_argument("--text", type=Path, metavar="FILE", help="keeps the compiled text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keeps the numbers")
    arguments = parser.parse_args()
    of_paper = re.fullmatch("(vit_)?(base|large|huge)", arguments.model) and arguments.what == "step"
    if arguments.against and not of_paper:
        parser.error("--against=plain is a step of pre-training: give --model=base, large or huge")
    chip = CHIPS["a100-80" if arguments.chip == "a100" else arguments.chip]
    try:
        print("\n".join(run(arguments, chip)))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace, chip: Chip) -> list[str]:
    """Compiles what the command line asks for, and describes it."""
    model = f"vit_{arguments.model}" if arguments.model in BATCHES else arguments.model
    batch = arguments.batch or default_batch(model, chip)
    devices = devices_for(TOPOLOGIES.get(chip.name, f"{chip.name}:1"))
    overrides = {"data.batch_size": batch * len(devices)} | dict(map(parse_setting, arguments.set))
    options = {"xla_gpu_enable_triton_gemm": arguments.gemm == "triton"} if chip.name in GPUS else None
    start = time.perf_counter()
    compiled = compile_program(model, overrides, devices, arguments.what, options)
    programs = [read(f"{model} {arguments.what}", compiled, time.perf_counter() - start)]
    if arguments.text:
        arguments.text.write_text(compiled.as_text())
    if arguments.against:
        from benchmarks.plain_step import compile_plain

        start = time.perf_counter()
        compiled = compile_plain(size_of(model), devices, batch, options)
        programs.append(read("plain control", compiled, time.perf_counter() - start))
    settings = "".join(f", {key}={value}" for key, value in list(overrides.items())[1:])
    lines = [f"{model}, {arguments.what}, {batch} images a chip{settings}; {chip.name}, jax {jax.__version__}", ""]
    lines += table(programs, chip, batch)
    for program in programs:
        lines += ["", f"dearest kernels of {program.name}:", *dearest(program, chip)]
    if arguments.json:
        found = {program.name: numbers(program, chip, batch) for program in programs}
        found = {"chip": chip.name, "model": model, "batch": batch, "overrides": overrides, "programs": found}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return lines


def default_batch(model: str, chip: Chip) -> int:
    return BATCHES[size_of(model)] if chip.name in GPUS else TPU_BATCH


def size_of(model: str) -> str:
    return next((size for size in BATCHES if size in model), "base")


def compile_program(
    model: str, overrides: dict[str, Any], devices: list[jax.Device], what: str, options: dict[str, Any] | None
) -> jax.stages.Compiled:
    """A config's training step, or what evaluation does with its model."""
    try:
        known = flatten_dict(read_config(model, {}).to_dict(), sep=".")
    except ModuleNotFoundError as error:
        raise UserError(f"--model={model}: there is no configs/{model}.py") from error
    if unknown := overrides.keys() - known.keys():
        raise UserError(f"--set: configs/{model}.py has no setting {', '.join(sorted(unknown))}")
    config = read_config(model, overrides)
    config.init_from = None
    mesh = make_mesh(config.mesh, devices)
    with tempfile.TemporaryDirectory() as folder:
        objective = OBJECTIVES.find(config.task)(config, Path(folder), mesh)
    plan = make_plan(config, objective, mesh)
    if what != "step":
        return compile_inference(objective, plan.abstract.variables(), what, options)
    key = jax.eval_shape(functools.partial(make_key, config.seed, "train"))
    return compile_train_step(plan.step_fn, plan.abstract, objective.batch, key, mesh, options)


def compile_inference(
    objective: Objective, variables: dict, what: str, options: dict[str, Any] | None
) -> jax.stages.Compiled:
    """The encoder on whole pictures and the mean of its patch tokens, or the prediction of hidden patches."""
    data = objective.evaluation.data

    def infer(variables: dict, images: jax.Array) -> jax.Array:
        model, images = objective.make_bind()(variables), data.normalize(images)
        if what == "reconstruct":
            return model(images, key=jax.random.key(0)).prediction
        return pool(model.encode(images), "patches", objective.model.class_tokens)

    with lowering_for(objective.mesh):
        return on_rows(infer, objective.mesh).lower(variables, objective.batch["image"]).compile(options)


def read(name: str, compiled: jax.stages.Compiled, seconds: float) -> Program:
    module = hlo.parse(compiled.as_text())
    return Program(name, module, read_kernels(module), memory_in_bytes(compiled), seconds)


def numbers(program: Program, chip: Chip, batch: int) -> dict[str, Any]:
    seconds = sum(kernel.seconds(chip) for kernel in program.kernels)
    rates = {"images_per_second": batch / seconds, "memory_bytes": program.memory, "compile_seconds": program.seconds}
    return totals(program.kernels)._asdict() | rates


def table(programs: list[Program], chip: Chip, batch: int) -> list[str]:
    """A row for each program, in Markdown; of one chip and one call."""
    on_gpu = chip.name in GPUS
    heads = ["GB moved", "TFLOP"] if on_gpu else ["M cycles"]
    basis = "roofline" if on_gpu else f"cycles at {chip.clock / 1e9:.2f} GHz"
    lines = [f"| program | {' | '.join(heads)} | kernels | images/s by {basis} | memory GiB | compiled in s |"]
    lines.append("|---|" + "--:|" * (len(heads) + 4))
    notes = []
    for program in programs:
        found = numbers(program, chip, batch)
        costs = [f"{found['bytes'] / 1e9:,.1f}", f"{found['flops'] / 1e12:,.2f}"]
        costs = costs if on_gpu else [f"{found['cycles'] / 1e6:,.1f}"]
        lines.append(
            f"| {program.name} | {' | '.join(costs)} | {found['launches']:,} | {found['images_per_second']:,.0f} "
            f"| {program.memory / 2**30:.1f} | {program.seconds:.0f} |"
        )
        if program.memory > chip.usable_memory:
            notes.append(f"{program.name} does not fit into {chip.usable_memory / 2**30:.0f} GiB")
        if found["unknown"]:
            notes.append(f"{program.name}: the arithmetic of {found['unknown']:,} custom kernels is not counted")
        if not found["is_exact"]:
            notes.append(f"{program.name}: at least, since a loop's length is not known")
    return lines + [f"({note})" for note in notes]


def dearest(program: Program, chip: Chip) -> list[str]:
    """A row for each of the dearest kernels, in Markdown; those of one line and shape (unrolled blocks) are one."""
    on_gpu, groups = chip.name in GPUS, defaultdict(list)
    for kernel in program.kernels:
        shape = kernel.instruction.shape.split("{")[0].lstrip("(")
        groups[shape, origin(program.module, kernel.instruction)].append(kernel)
    lines = ["| ms | times | " + ("GB | TFLOP" if on_gpu else "M cycles") + " | (first) result | kernel | from |"]
    lines.append("|--:|--:|" + ("--:|--:|" if on_gpu else "--:|") + "---|---|---|")
    of_group = {key: sum(kernel.seconds(chip) for kernel in group) for key, group in groups.items()}
    for key in sorted(groups, key=of_group.get, reverse=True)[:DEAREST]:
        found = totals(groups[key])
        costs = f"{found.bytes / 1e9:.2f} | {found.flops / 1e12:.2f}" if on_gpu else f"{found.cycles / 1e6:.2f}"
        (shape, source), name = key, groups[key][0].instruction.name
        lines.append(f"| {1000 * of_group[key]:.2f} | {found.launches} | {costs} | {shape} | {name} | {source} |")
    return lines


def origin(module: hlo.Module, instruction: hlo.Instruction) -> str:
    """Where an instruction comes from: the lines of our two innermost files, the pass, and the operation's name."""
    frames = [(Path(file), line) for file, line in hlo.stack(module, instruction)]
    ours = [(file, line) for file, line in frames if OURS in file.parents and not NOT_OURS & {*file.parts}]
    inner = {file: f"{file.name}:{line}" for file, line in reversed(ours)}
    inner = [inner[file] for file in dict.fromkeys(file for file, _ in ours)]
    name = hlo.op_name(instruction)
    backward = " (backward)" if "transpose(" in name else ""
    return f"{' < '.join(inner[:2]) or '?'}{backward} {name.rsplit('/', 1)[-1]}"


if __name__ == "__main__":
    main()
