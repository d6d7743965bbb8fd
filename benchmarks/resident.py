"""Small pictures on the device against reading them: `python -m benchmarks.resident --path=TFDS_DIR [--json=FILE]`.

Images a second of ready uint8 batches on the device, of CIFAR-10 as configs/cifar10.py has it (whole pictures) and with
random crops: cut out on the device (mae_jax/data/device_batches.py), or read by threads. They take turns; medians.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import jax

from configs import cifar10
from mae_jax.data.device_batches import training_batches
from mae_jax.data.resolutions import make_stages
from mae_jax.data.sources import make_source
from mae_jax.runtime.mesh import make_mesh

CROPS = {"whole": ((1.0, 1.0), (1.0, 1.0)), "random crops": ((0.2, 1.0), (3 / 4, 4 / 3))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", help="TFDS's data_dir; without it, pictures made from numbers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of a turn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = {name: measure(arguments, *crop) for name, crop in CROPS.items()}
    print(
        f"{jax.devices()[0].device_kind}, batches of 512 of CIFAR-10, images/s, medians of {arguments.rounds} turns\n"
    )
    print("| pictures | read one by one | on the device | ratio | read at the start |")
    print("|---|---|---|---|---|")
    for name, row in found.items():
        rates = f"{row['read']:,.0f} | {row['device']:,.0f} | {row['ratio']:.1f}"
        print(f"| {name} | {rates} | {row['start_seconds']:.1f} s |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def measure(arguments: argparse.Namespace, scale: tuple, ratio: tuple) -> dict[str, float]:
    """Images a second of both ways, and the seconds that it takes to read all pictures."""
    config = cifar10.get_config()
    config.data.update(path=arguments.path, crop_scale=scale, crop_ratio=ratio, num_examples=50_000)
    config.data.name = "cifar10" if arguments.path else "synthetic"
    source, mesh = make_source(config.data, "train", (32, 32), 3), make_mesh(config.mesh)
    stages, batches = make_stages((), (32, 32), 1), {}
    for name, on_device in (("read", False), ("device", True)):
        config.data.on_device = on_device
        start = time.perf_counter()
        batches[name] = training_batches(
            source, config.data.copy_and_resolve_references(), 3, mesh, ("image",), stages, range(10**6)
        )
        start_seconds = time.perf_counter() - start
        images_per_second(batches[name], 0)
    turns = {name: [] for name in batches}
    for _, name in itertools.product(range(arguments.rounds), batches):
        turns[name].append(images_per_second(batches[name], arguments.seconds))
    medians = {name: statistics.median(values) for name, values in turns.items()}
    return medians | {"ratio": medians["device"] / medians["read"], "start_seconds": start_seconds}


def images_per_second(batches, seconds: float) -> float:
    """Takes batches for so long, at least four, each until it is ready."""
    start, images = time.perf_counter(), 0
    while images < 4 * 512 or time.perf_counter() - start < seconds:
        images += len(jax.block_until_ready(next(batches))["image"])
    return images / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
