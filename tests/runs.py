"""Starting the program as its users do, with a model that trains in seconds."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.conftest import COMPILE_QUICKLY

ROOT = Path(__file__).parent.parent
WITHOUT_TORCH = ROOT / "tests" / "without_torch"  # as users' environments are; TensorBoard's writer starts sooner so
COMPILED = tempfile.TemporaryDirectory(prefix="compiled_")  # what one run has compiled, the next ones load
TINY = (
    "--config=configs/digits.py",
    "--config.model.width=16", "--config.model.depth=2", "--config.model.num_heads=2",
    "--config.model.decoder_width=16", "--config.model.decoder_depth=1", "--config.model.decoder_num_heads=2",
    "--config.data.batch_size=32", "--config.train.log_every_steps=5",
    "--config.model.scan_unroll=1",  # compiles faster; the tests of tasks have the config's own
)  # fmt: skip


def start(*arguments: str, under: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """Starts main.py with one CPU device and no terminal; `under`: the command that starts it, as `nice` does."""
    env = os.environ | {"XLA_FLAGS": COMPILE_QUICKLY, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(WITHOUT_TORCH)}
    env |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= environment
    command = [*under, sys.executable, "main.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Runs main.py to its end: exit code, standard output, standard error."""
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def read_checkpoint(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by name."""
    arrays = {}
    for item in ("params", "opt_state"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(Path(workdir).absolute() / "checkpoints" / str(step) / item)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def losses(workdir: Path) -> list[tuple[int, float]]:
    """(step, train/loss) of every such line in metrics.jsonl, in the file's order."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
