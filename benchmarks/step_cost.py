"""What a training step costs as it grows: `python -m benchmarks.step_cost [--model=tiny] [--what batch depth ...]`.

Tables of the whole step (masks, forward, backward, AdamW) of a config of the library: images/s against batch size,
depth and tokens, each time beside the one that theory says (the operations of `models.flops`); what accumulation adds
to the time of the micro-batch that it repeats, up to a batch of 4,096, and the memory that it saves one; what remat
saves and costs. The programs of a table take turns, each in a process of its own; a time's ratio is that to the first
row's in the same round, and the median over the rounds.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.jax_step import CompiledStep, JaxStep, read_config
from benchmarks.train_step import MODELS, has_accelerator, parse_setting
from benchmarks.turns import Turn, Worker, spread, take_turns
from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import block_flops, decoder_tokens, encoder_tokens, train_flops

# Settings of a model on a CPU, where its own take too long: small pictures, and batches that fit the caches less.
ON_A_CPU = {"tiny": {"model.image_size": 128}}
WHOLE_BATCH = 4096  # the paper's
# Several programs share a device, and each takes what it needs.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
GIGA, MIB = 1e9, 2**20


class Case(NamedTuple):
    """One row of a table."""

    name: str
    overrides: dict[str, Any]  # settings that differ from the config's


def batch_cases(base: dict[str, Any], model: MAEConfig) -> list[Case]:
    batch = base["data.batch_size"]
    sizes = [size for size in (batch // 4, batch // 2, batch, 2 * batch) if size]
    return [Case(f"{size} images", base | {"data.batch_size": size}) for size in sizes]


def depth_cases(base: dict[str, Any], model: MAEConfig) -> list[Case]:
    depths = (max(1, model.depth // 4), max(1, model.depth // 2), model.depth, 2 * model.depth)
    return [Case(f"{depth} blocks", base | {"model.depth": depth}) for depth in dict.fromkeys(depths)]


def token_cases(base: dict[str, Any], model: MAEConfig) -> list[Case]:
    """Larger images, and then more of one's patches for the encoder."""
    cases, patch = [], model.patch_size
    for factor in (0.5, 1, 1.5, 2):
        size = tuple(max(1, round(factor * side / patch)) * patch for side in model.image_size)
        cases.append(Case(f"{size[0]} x {size[1]} pixels", base | {"model.image_size": size}))
    cases += [Case(f"mask ratio {ratio:g}", base | {"model.mask_ratio": ratio}) for ratio in (0.5, 0.0)]
    return cases


def accumulate_cases(base: dict[str, Any], model: MAEConfig) -> list[Case]:
    batch = base["data.batch_size"]
    cases = [Case(f"{batch}", base)]
    for parts in (2, 4, 8, max(16, WHOLE_BATCH // batch)):
        settings = {"data.batch_size": parts * batch, "train.accumulate_steps": parts}
        cases.append(Case(f"{parts * batch} in {parts} parts", base | settings))
    return cases


def memory_cases(base: dict[str, Any], model: MAEConfig) -> list[Case]:
    """One large batch in more and more parts, of which the smallest is the table's batch; these are not run."""
    most = max(1, WHOLE_BATCH // base["data.batch_size"])
    sizes = [(WHOLE_BATCH, parts) for parts in dict.fromkeys((1, max(1, most // 16), max(1, most // 4), most))]
    cases = []
    for size, parts in (*sizes, (WHOLE_BATCH // most, 1)):
        settings = {"data.batch_size": size, "train.accumulate_steps": parts}
        cases.append(Case(f"{size} in {parts} part{'s' * (parts > 1)}", base | settings))
    return cases


def remat_cases(base: dict[str, Any], model: MAEConfig) -> list[Case]:
    return [Case(f"remat {remat}", base | {"model.remat": remat}) for remat in (None, True)]


TABLES: dict[str, Callable[[dict[str, Any], MAEConfig], list[Case]]] = {
    "batch": batch_cases,
    "depth": depth_cases,
    "tokens": token_cases,
    "accumulate": accumulate_cases,
    "remat": remat_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", choices=MODELS)
    parser.add_argument(
        "--what", nargs="+", default=list(TABLES), choices=TABLES, metavar="TABLE", help=", ".join(TABLES)
    )
    parser.add_argument("--batch", type=int, help="images a step of the usual row; default: as benchmarks.train_step")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings: model.attention=cudnn ...")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time of a turn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()  # fmt: skip
    config, base = usual_settings(arguments)
    model = read_model(config, base)
    print(f"{arguments.model}: configs/{config}.py with {', '.join(f'{key}={value}' for key, value in base.items())}")
    found: dict[str, Any] = {"model": arguments.model, "config": config, "overrides": base, "tables": {}}
    for what in arguments.what:
        rows = measure(config, TABLES[what](base, model), arguments.rounds, arguments.seconds)
        found["tables"][what] = rows
        print("\n" + "\n".join(describe(what, rows, arguments.rounds)), flush=True)
        if what == "accumulate":
            rows = found["tables"]["memory"] = needed_memory(config, memory_cases(base, model))
            print("\n" + "\n".join(describe_memory(rows)), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def usual_settings(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The config's name, and the settings that all rows share."""
    config, cpu_batch, batch = MODELS[arguments.model]
    accelerated = has_accelerator()
    base = {"data.batch_size": arguments.batch or (batch if accelerated else min(cpu_batch, 16))}
    base |= {"model.dtype": "bfloat16" if accelerated else "float32"}
    base |= {} if accelerated else ON_A_CPU.get(arguments.model, {})
    return config, base | dict(map(parse_setting, arguments.set))


def read_model(config: str, overrides: dict[str, Any]) -> MAEConfig:
    return MAEConfig(**read_config(config, overrides).model)


def executed_flops(model: MAEConfig) -> int:
    """Operations of one image that a step makes: those that count as its work, and those that remat repeats.

    A block's forward pass is repeated but for the second layer of its MLP, whose result the backward pass needs not.
    """
    if not model.remat:
        return train_flops(model)
    repeated = 0
    for depth, tokens, blocks in (
        (model.depth, encoder_tokens(model), model.blocks),
        (model.decoder_depth, decoder_tokens(model), model.decoder_blocks),
    ):
        width, mlp_width = blocks.width, blocks.mlp_width
        repeated += depth * (block_flops(tokens, width, mlp_width) - 2 * tokens * width * mlp_width)
    return train_flops(model) + repeated


def measure(config: str, cases: list[Case], rounds: int, seconds: float) -> list[dict]:
    """Times the cases turn by turn: a dict for each, with the reason of those that failed."""
    workers, failed = {}, {}
    try:
        for case in cases:
            try:
                workers[case.name] = Worker(JaxStep, config, case.overrides, False, environment=ENVIRONMENT)
                workers[case.name].turn(1)  # an accelerator's memory may be too small only now
            except RuntimeError as error:
                failed[case.name] = str(error).splitlines()[0]
                if case.name in workers:
                    workers.pop(case.name).close()
        turns = take_turns(workers, rounds, seconds)
    finally:
        for worker in workers.values():
            worker.close()
    rows = []
    for case in cases:
        row = {"name": case.name, "overrides": case.overrides}
        if case.name in failed:
            rows.append(row | {"failed": failed[case.name]})
            continue
        model, batch = read_model(config, case.overrides), case.overrides["data.batch_size"]
        facts = workers[case.name].facts
        rows.append(row | facts | {"executed_flops": executed_flops(model)} | times(turns[case.name], batch))
    return compare(rows)


def times(turns: list[Turn], batch: int) -> dict:
    """What the turns of one case say; times in seconds."""
    step = spread(turns)
    per_image = [turn.seconds / batch for turn in turns]
    return {"images_per_second": batch / step.median, "step_seconds": step._asdict(), "image_seconds": per_image}


def compare(rows: list[dict]) -> list[dict]:
    """The rows, each with its time of an image as a ratio to the first good row's, measured and in theory."""
    first = next((row for row in rows if "failed" not in row), None)
    compared = []
    for row in rows:
        if "failed" not in row:
            by_round = [own / its for own, its in zip(row["image_seconds"], first["image_seconds"], strict=True)]
            ratio = {"median": statistics.median(by_round), "least": min(by_round), "greatest": max(by_round)}
            row = row | {"time_ratio": ratio, "theory_ratio": row["executed_flops"] / first["executed_flops"]}
        compared.append(row)
    return compared


def needed_memory(config: str, cases: list[Case]) -> list[dict]:
    """What the compiler says that each case needs; nothing is run."""
    rows = []
    for case in cases:
        row = {"name": case.name, "overrides": case.overrides}
        try:
            worker = Worker(CompiledStep, config, case.overrides, environment=ENVIRONMENT)
        except RuntimeError as error:  # a compiler may refuse what does not fit
            rows.append(row | {"failed": str(error).splitlines()[0]})
            continue
        worker.close()
        rows.append(row | worker.facts)
    return rows


def describe(what: str, rows: list[dict], rounds: int) -> list[str]:
    """A table of what was measured, in Markdown."""
    good = next((row for row in rows if "failed" not in row), None)
    where = f"{good['devices']} x {good['device']}, jax {good['jax']}, " if good else ""
    lines = [
        f"{what}: {where}medians of {rounds} turns (least, most)",
        "",
        f"| {what} | images/s | step ms | GFLOP an image | time of an image | in theory | step needs MiB |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed']} | | | | | |")
            continue
        step, ratio = (list(row[name].values()) for name in ("step_seconds", "time_ratio"))
        step = [1000 * value for value in step]
        lines.append(
            f"| {row['name']} | {row['images_per_second']:,.1f} | {step[0]:,.0f} ({step[1]:,.0f}, {step[2]:,.0f}) "
            f"| {row['flops'] / GIGA:.3g} | {ratio[0]:.2f} ({ratio[1]:.2f}, {ratio[2]:.2f}) "
            f"| {row['theory_ratio']:.2f} | {row['memory_bytes'] / MIB:,.0f} |"
        )
    return lines


def describe_memory(rows: list[dict]) -> list[str]:
    """A table of what the compiler says, in Markdown."""
    lines = ["memory by the compiler, nothing is run", "", "| batch | step needs MiB |", "|---|--:|"]
    for row in rows:
        cell = f"failed: {row['failed']}" if "failed" in row else f"{row['memory_bytes'] / MIB:,.0f}"
        lines.append(f"| {row['name']} | {cell} |")
    return lines


if __name__ == "__main__":
    main()
