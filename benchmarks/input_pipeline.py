"""Speed of the input: `python -m benchmarks.input_pipeline DIR [--against=torch,tf] [--kinds=NEW] [--json=FILE]`.

From the JPEG files of DIR, an image folder, to ready uint8 batches of random crops: the library as users run it, also
on other forms of these pictures (--kinds), other ways to decode and resize in the same loader, and other libraries
where they are installed. The programs take turns,
each in processes of its own; before a turn what was read ahead is used up, and after it all reading has come to rest.
CPU seconds count all processes and are what a busy machine falsifies least: images a CPU second is what one core makes
when it does nothing else. Medians over turns.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.input_kinds import write_kinds
from benchmarks.input_programs import BACKENDS, Job, our_crop, ours, programs, quality
from benchmarks.turns import Worker
from mae_jax.data.sources import make_sources
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.platform import keep_freed_memory

READY = 8  # batches that may have been read ahead, a worker: ours were 6, 2 in each stage of the pipeline
PACKAGES = ("pillow", "simplejpeg", "kornia-rs", "opencv-python-headless", "torch", "tensorflow-cpu", "tensorflow",
            "grain")  # fmt: skip


class Turn(NamedTuple):
    """What one turn of a program took, for one image."""

    seconds: float
    cpu_seconds: float


def main() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    cores = usable_cores()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR", help="an image folder of JPEG files")
    parser.add_argument("--against", type=lambda text: text.split(","), default=[], metavar="torch,tf")
    parser.add_argument("--kinds", metavar="NEW", help="a new folder, for the same pictures as table, parquet, ...")
    parser.add_argument("--without_backends", action="store_true", help="leave out other decoders and resizers")
    parser.add_argument("--workers", type=int, nargs="+", help="worker processes, 0: threads; default: 0, 1, 2, 4, ...")
    parser.add_argument("--size", type=int, default=224, help="height and width of the crops, pixels")
    parser.add_argument("--batch", type=int, default=64, help="images a batch")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program and number of workers")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time of a turn")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.against) - {"torch", "tf"}:
        parser.error(f"--against={','.join(unknown)}: only torch and tf can be compared with")
    workers = arguments.workers or sorted({0, cores, *(2**i for i in range(cores.bit_length()) if 2**i <= cores)})
    try:
        measured = measure(arguments, workers, cores)
    except UserError as error:
        parser.error(str(error))
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n")


def measure(arguments: argparse.Namespace, workers: list[int], cores: int) -> dict:
    """Times what the command line asks for, and prints a table as it goes."""
    found, missing = programs(arguments.against, backends=not arguments.without_backends)
    job = Job(arguments.folder, arguments.size, arguments.batch, 0)
    source, kinds = job.source(), {}
    if arguments.kinds:
        kinds = write_kinds(Path(arguments.kinds), *make_sources(job.settings(), (job.size, job.size), 3))
    found |= dict.fromkeys(kinds)
    jobs = [Job(arguments.folder, arguments.size, arguments.batch, count, kinds) for count in workers]
    backends = {"mae_jax": our_crop} | {name: backend for name, (_, backend) in BACKENDS.items()}
    decibels = {name: quality(backends[name], source, arguments.size) for name in found if name in backends}
    measured = {
        "folder": arguments.folder, "size": arguments.size, "batch": arguments.batch, "rounds": arguments.rounds,
        "cores": cores, "python": platform.python_version(), "packages": versions(), "missing": missing, "rows": [],
    }  # fmt: skip
    print(f"{len(source)} pictures of {arguments.folder}, {arguments.size} x {arguments.size} crops in batches of "
          f"{arguments.batch}, {cores} cores; medians [least, most] of {arguments.rounds} turns")  # fmt: skip
    for name in missing:
        print(f"left out: {name}")
    print("\n| program | dB to Pillow | workers | images/s | a core | CPU ms an image | images a CPU second "
          "| mae_jax is faster | and saves CPU |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    for job in jobs:
        turns = take_turns(list(found), job, arguments)
        for name, own in turns.items():
            own_decibels = decibels.get(name)  # None: not known
            same = None if own_decibels is None else math.isinf(own_decibels)
            row = {"program": name, "workers": job.workers, "same_bits": same}
            row |= {"decibels": None if same else own_decibels}  # JSON has no infinity
            measured["rows"].append(row | speed(own, turns["mae_jax"], cores))
            print(describe(measured["rows"][-1]), flush=True)
    return measured


def take_turns(programs: list[str], job: Job, arguments: argparse.Namespace) -> dict[str, list[Turn]]:
    """`rounds` turns of each program, one after the other, after one turn to warm up."""
    workers, counts = {}, {}
    turns = {name: [] for name in programs}
    try:
        for name in programs:
            workers[name] = Worker(Reading, name, job, daemon=False)
            warm = workers[name].turn(2 * max(1, job.workers)).seen
            counts[name] = max(2, round(arguments.seconds / (warm["seconds"] * job.batch_size)))
        for _ in range(arguments.rounds):
            for name, worker in workers.items():
                turns[name].append(Turn(**worker.turn(counts[name]).seen))
    finally:
        for worker in workers.values():
            worker.close()
    return turns


class Reading:
    """The batches of a program, in a process of its own: threads that rest in one program slow down another."""

    facts: dict = {}

    def __init__(self, program: str, job: Job):
        keep_freed_memory()  # as main.py does
        found, _ = programs(["torch", "tf"])
        make = functools.partial(ours, kind=program) if program in job.kinds else found[program]
        self._batches, self._lead = make(job), READY * max(1, job.workers)

    def __call__(self, count: int) -> dict[str, float]:
        """Times `count` batches, after those that may have been ready before."""
        for _ in range(self._lead):
            next(self._batches)
        start, cpu_start = time.perf_counter(), cpu_seconds()
        images = sum(len(next(self._batches)) for _ in range(count))
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
        come_to_rest()
        return {"seconds": seconds / images, "cpu_seconds": cpu / images}


def come_to_rest() -> None:
    """Waits until nothing is read ahead any more: the next program's turn is its own."""
    while True:
        before = cpu_seconds()
        time.sleep(0.1)
        if cpu_seconds() - before < 0.01:
            return


def cpu_seconds() -> float:
    """Of this process and of the worker processes that run, where the system tells it."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # proc(5): utime and stime
    return total


def speed(own: list[Turn], ours: list[Turn], cores: int) -> dict:
    """The numbers of one row; the ratios are of turns of the same round."""
    rates, cpu_rates = ([1 / turn[field] for turn in own] for field in (0, 1))
    pairs = list(zip(ours, own, strict=True))
    return {
        "images_per_second": statistics.median(rates),
        "images_per_second_range": [min(rates), max(rates)],
        "images_per_second_per_core": statistics.median(rates) / cores,
        "cpu_ms_per_image": 1000 * statistics.median(turn.cpu_seconds for turn in own),
        "images_per_cpu_second": statistics.median(cpu_rates),
        "images_per_cpu_second_range": [min(cpu_rates), max(cpu_rates)],
        "ratio": statistics.median(other.seconds / turn.seconds for turn, other in pairs),
        "cpu_ratio": statistics.median(other.cpu_seconds / turn.cpu_seconds for turn, other in pairs),
    }


def describe(row: dict) -> str:
    """A line of the table."""
    quality_text = "same" if row["same_bits"] else f"{row['decibels']:.1f}" if row["decibels"] else ""
    least, most = row["images_per_second_range"]
    slowest, fastest = row["images_per_cpu_second_range"]
    return (
        f"| {row['program']} | {quality_text} | {row['workers']} | {row['images_per_second']:.0f} [{least:.0f}, "
        f"{most:.0f}] | {row['images_per_second_per_core']:.0f} | {row['cpu_ms_per_image']:.2f} | "
        f"{row['images_per_cpu_second']:.0f} [{slowest:.0f}, {fastest:.0f}] | {row['ratio']:.2f} | "
        f"{row['cpu_ratio']:.2f} |"
    )


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
