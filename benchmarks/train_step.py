"""Speed of the pre-training step: `python -m benchmarks.train_step --model=cifar [--against=torch] [--json=FILE]`.

The whole step as users run it (masks, forward, backward, AdamW) of a config of the library, on one batch that lies on
the device. With --against=torch it takes turns with Hugging Face's ViTMAE of the same shapes, precision and AdamW,
eager and, on a GPU or with --torch_compile, compiled; the ratio is to the faster of them. Times are medians over turns;
a process waits while another one works. The share of the chip is that of the rate of large square matrix products,
measured in the same run.
"""

import argparse
import json
from pathlib import Path

from benchmarks.jax_step import JaxStep
from benchmarks.torch_step import TorchStep
from benchmarks.turns import Turn, Worker, spread, take_turns

MODELS = {  # name -> (config, batch on a CPU, batch on an accelerator)
    "tiny": ("image_folder", 32, 1024),
    "cifar": ("cifar10", 64, 1024),
    "vit_small": ("vit_small", 16, 512),
    "vit_base": ("vit_base", 8, 256),
    "vit_large": ("vit_large", 4, 256),
    "vit_huge": ("vit_huge", 2, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar", choices=MODELS)
    parser.add_argument("--batch", type=int, help="images a step; default: 2 to 64 on a CPU, 128 to 1,024 elsewhere")
    parser.add_argument("--against", choices=("torch",))
    parser.add_argument("--torch_compile", action="store_true", help="time torch.compile on a CPU, too")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings: model.remat=True ...")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each program")
    parser.add_argument("--seconds", type=float, default=5.0, help="least time of a turn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured = measure(arguments)
    print("\n".join(describe(measured)))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


def measure(arguments: argparse.Namespace) -> dict:
    """Times what the command line asks for."""
    config, cpu_batch, batch = MODELS[arguments.model]
    accelerated = has_accelerator()
    overrides = {"data.batch_size": arguments.batch or (batch if accelerated else cpu_batch)}
    overrides |= {"model.dtype": "bfloat16" if accelerated else "float32"} | dict(map(parse_setting, arguments.set))
    # Two programs share a GPU's memory; each takes what it needs.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if arguments.against else {}
    workers = {"mae_jax": Worker(JaxStep, config, overrides, environment=environment)}
    failed = {}
    if arguments.against:
        kinds = {"torch": False} | ({"torch.compile": True} if accelerated or arguments.torch_compile else {})
        for name, compiled in kinds.items():
            try:
                workers[name] = Worker(TorchStep, config, overrides, compiled)
            except RuntimeError as error:
                failed[name] = str(error).splitlines()[0]
    try:
        turns = take_turns(workers, arguments.rounds, arguments.seconds)
    finally:  # whatever happens, their memory is free for the next ones
        for worker in workers.values():
            worker.close()
    measured = {"model": arguments.model, "config": f"configs/{config}.py", "overrides": overrides, "failed": failed}
    measured |= {"programs": {}, "rounds": arguments.rounds}
    for name, worker in workers.items():
        measured["programs"][name] = worker.facts | speed(turns[name], overrides["data.batch_size"])
    return measured | summary(measured["programs"])


def has_accelerator() -> bool:
    """Whether JAX finds one; asked in a process that ends, so that this one holds no device."""
    worker = Worker(Platform)
    worker.close()
    return worker.facts["platform"] != "cpu"


class Platform:
    """Work that only tells where JAX runs."""

    def __init__(self):
        import jax

        self.facts = {"platform": jax.default_backend()}

    def __call__(self, count: int) -> dict:
        return {}


def parse_setting(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value.lower() if value in ("True", "False") else value)
    except json.JSONDecodeError:
        return key, value


def speed(turns: list[Turn], batch: int) -> dict:
    """Step times of one program in seconds, and what follows from them."""
    seconds = spread(turns)
    return {
        "step_seconds": seconds._asdict(),
        "images_per_second": batch / seconds.median,
        "peak_memory_bytes": turns[-1].seen["peak_memory_bytes"],
        "loss": turns[-1].seen["loss"],
    }


def summary(programs: dict[str, dict]) -> dict:
    """The rates of the step, and its ratio to the fastest of the others."""
    ours = programs["mae_jax"]
    tflops = ours["images_per_second"] * ours["flops"] / 1e12
    found = {"images_per_second": ours["images_per_second"], "tflops_per_second": tflops}
    found["matmul_share"] = tflops / ours["matmul_tflops"]
    others = [program["images_per_second"] for name, program in programs.items() if name != "mae_jax"]
    if others:
        found |= {"torch_images_per_second": max(others), "ratio": ours["images_per_second"] / max(others)}
    return found


def describe(measured: dict) -> list[str]:
    """What was measured, as a person reads it."""
    ours = measured["programs"]["mae_jax"]
    settings = ", ".join(f"{key}={value}" for key, value in measured["overrides"].items())
    lines = [
        f"{measured['model']}: {measured['config']} with {settings}",
        f"{ours['devices']} x {ours['device']}, jax {ours['jax']}, medians of {measured['rounds']} turns (least, most)",
        "",
        "| program | images/s | step ms | compile s | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for name, program in measured["programs"].items():
        step = [1000 * value for value in program["step_seconds"].values()]
        lines.append(
            f"| {name} | {program['images_per_second']:,.1f} | {step[0]:,.1f} ({step[1]:,.1f}, {step[2]:,.1f}) "
            f"| {program['compile_seconds']:.1f} | {program['peak_memory_bytes'] / 2**20:,.0f} |"
        )
    lines += [f"| {name} | failed: {why} | | | |" for name, why in measured["failed"].items()]
    rate = f"{measured['tflops_per_second']:.3g} TFLOP/s, {measured['matmul_share']:.0%} of the"
    memory = f"the step needs {ours['memory_bytes'] / 2**20:,.0f} MiB a device"
    lines += ["", f"{rate} {ours['matmul_tflops']:.3g} TFLOP/s of large matrix products; {memory}"]
    if "ratio" in measured:
        lines.append(f"ratio {measured['ratio']:.2f}")
    return lines


if __name__ == "__main__":
    main()
