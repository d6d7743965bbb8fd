"""Kills a run again and again and looks whether it ends as one that nobody touched: `python -m benchmarks.soak`.

Part 1: SIGKILL at random moments of a run of one process: while it starts, compiles, trains, saves and measures. At the
end every number of the last checkpoint and of result.json must be the same, bit for bit.
Part 2: SIGKILL with another mesh or number of processes each time. At the end the data must have come in the same
order, and the losses may differ by rounding only.
Both have a time limit; what was done until then is reported. Prints a Markdown summary; the exit code is 1 if a run
ended otherwise.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
STEPS = 900
EVERY = 9  # steps from checkpoint to checkpoint
MODEL = (
    "--config=configs/digits.py", "--config.model.width=16", "--config.model.depth=2", "--config.model.num_heads=4",
    "--config.model.decoder_width=16", "--config.model.decoder_depth=1", "--config.model.decoder_num_heads=4",
    "--config.model.scan_unroll=1", "--config.data.batch_size=32", f"--config.train.steps={STEPS}",
    "--config.train.log_every_steps=5", f"--config.checkpoint.every_steps={EVERY}", "--config.evaluate.every_steps=225",
    "--config.evaluate.max_train_examples=200", "--config.evaluate.linear_probe=False",
)  # fmt: skip
# (processes, devices of each, settings) of part 2.
LAYOUTS = (
    (1, 1, ()),
    (1, 8, ("--config.mesh.data=8",)),
    (1, 8, ("--config.mesh.data=1", "--config.mesh.fsdp=8")),
    (1, 8, ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")),
    (2, 4, ("--config.mesh.data=8",)),
    (2, 2, ("--config.mesh.data=2", "--config.mesh.tensor=2")),
    (2, 4, ("--config.mesh.data=2", "--config.mesh.fsdp=4")),
    (1, 4, ("--config.mesh.data=1", "--config.mesh.tensor=4")),
)
LOSS_TOLERANCE = 1e-4  # relative, of the final loss on other meshes


class Run:
    """A run of one or more processes in a workdir, started as users start it."""

    def __init__(self, workdir: Path, cache: Path, layout=LAYOUTS[0]):
        processes, devices, settings = layout
        self._log = workdir.with_suffix(".log").open("a")
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        env |= {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }  # fmt: skip
        command = [sys.executable, "main.py", *MODEL, *settings, f"--workdir={workdir}"]
        flags = [[]]
        if processes > 1:
            address = f"--coordinator=127.0.0.1:{free_port()}"
            flags = [[address, f"--process_count={processes}", f"--process_index={i}"] for i in range(processes)]
        self._processes = [
            subprocess.Popen([*command, *extra], cwd=ROOT, env=env, stdout=self._log, stderr=self._log)
            for extra in flags
        ]

    def wait(self, seconds: float) -> list[int] | None:
        """Exit codes, or None if the run is still going after so many seconds."""
        deadline = time.monotonic() + seconds
        codes = []
        for process in self._processes:
            try:
                codes.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                return None
        self._log.close()
        return codes

    def kill(self) -> None:
        """SIGKILL to all processes, which ends them wherever they are."""
        for process in self._processes:
            process.send_signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._log.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def lines(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    found = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in found]


def step_of(workdir: Path) -> int:
    return max((line["step"] for line in lines(workdir)), default=0)


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in lines(workdir) if "train/loss" in line}


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint by name."""
    found = {}
    for item in ("params", "opt_state"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(workdir.absolute() / "checkpoints" / str(STEPS) / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


class Kill(NamedTuple):
    """What a kill met."""

    seconds: float  # since the process was started
    before: int  # the last step reported when it was started
    after: int  # and when it was killed
    saving: bool  # a checkpoint was half-written


def is_half_saved(workdir: Path) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("tmp" in entry.name for entry in folder.iterdir())


def finish(workdir: Path, cache: Path, layout=LAYOUTS[0]) -> None:
    codes = Run(workdir, cache, layout).wait(300)
    if codes is None or any(codes):
        sys.exit(f"the run in {workdir} did not end well: {codes}; see {workdir.with_suffix('.log')}")


def kill_often(
    workdir: Path, cache: Path, kills: int, deadline: float, layouts, saves: tuple[int, int], rng: random.Random
) -> list[Kill]:
    """Starts and kills a run at random moments, each time in the next layout; what each kill met.

    The moments fall just after a step that is saved, where files are being written; of several kills in the same layout
    every other one is drawn over the first twelve seconds of a process, starting included.

    Args:
      saves: (least, most) checkpoints that a run writes before it is killed.
    """
    met = []
    for number in range(kills):
        if time.monotonic() > deadline or (workdir / "result.json").exists():
            break
        layout, before = layouts[number % len(layouts)], step_of(workdir)
        run, start = Run(workdir, cache, layout), time.monotonic()
        if number % 2 or len(layouts) > 1:
            wanted = before + EVERY * rng.randint(*saves)
            while run.wait(0) is None and step_of(workdir) < wanted and time.monotonic() - start < 90:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
        else:
            run.wait(rng.uniform(0.5, 12))
        if (codes := run.wait(0)) is not None:
            if any(codes):
                sys.exit(f"the run in {workdir} failed by itself: {codes}; see {workdir.with_suffix('.log')}")
            break
        run.kill()
        kill = Kill(time.monotonic() - start, before, step_of(workdir), is_half_saved(workdir))
        met.append(kill)
        print(
            f"kill {number + 1}: {layout[0]} x {layout[1]} devices {' '.join(layout[2])}, {kill.seconds:.1f} s after "
            f"its start, step {kill.before} -> {kill.after}{', while saving' if kill.saving else ''}",
            flush=True,
        )
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of part 1")
    parser.add_argument("--elastic_kills", type=int, default=10, help="of part 2")
    parser.add_argument("--minutes", type=float, default=15, help="after which no further run is killed")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, begin = random.Random(args.seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    cache, unbroken = folder / "compiled", folder / "unbroken"
    finish(unbroken, cache)
    expected, expected_losses = arrays(unbroken), losses(unbroken)

    killed = folder / "killed"
    met = kill_often(killed, cache, args.kills, begin + 60 * args.minutes * 0.6, LAYOUTS[:1], (1, 2), rng)
    finish(killed, cache)
    found = arrays(killed)
    same = found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in found)
    same_result = (killed / "result.json").read_text() == (unbroken / "result.json").read_text()
    same_losses = losses(killed) == expected_losses
    saving, starting = sum(kill.saving for kill in met), sum(kill.after == kill.before for kill in met)

    elastic = folder / "elastic"
    moved = kill_often(elastic, cache, args.elastic_kills, begin + 60 * args.minutes, LAYOUTS, (4, 8), rng)
    finish(elastic, cache, LAYOUTS[0])
    theirs = losses(elastic)
    worst = max(abs(theirs[step] / loss - 1) for step, loss in expected_losses.items())
    last = abs(theirs[STEPS] / expected_losses[STEPS] - 1)
    steps = sum(kill.after - kill.before for kill in moved)
    good = theirs.keys() == expected_losses.keys() and last < LOSS_TOLERANCE

    one = [
        f"parameters and optimizer {'the same bits' if same else 'DIFFER'}",
        f"result.json {'the same' if same_result else 'DIFFERS'}",
        f"every reported loss {'the same' if same_losses else 'DIFFERS'}",
    ]
    many = f"final loss differs by {last:.1e} (relative), the worst reported loss by {worst:.1e}"
    print(f"\n| {STEPS} steps of a tiny model on the digits, seed {args.seed} | kills | the end |\n|---|---|---|")
    print(
        f"| one process | {len(met)}, {starting} before its first new step, {saving} while saving | {', '.join(one)} |"
    )
    print(f"| another mesh or number of processes each time | {len(moved)}, after {steps} steps together | {many} |")
    print(f"\n{time.monotonic() - begin:.0f} s, jax {jax.__version__}")
    if same and same_result and same_losses and good:
        shutil.rmtree(folder)
    else:
        sys.exit(f"not the same end: see {folder}")


if __name__ == "__main__":
    main()
