"""Runs of a model that trains in seconds: of the program as its users start it, and of tasks in this process."""

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks import check_task
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
TINY_SETTINGS = {
    "model.width": 16, "model.depth": 2, "model.num_heads": 2,
    "model.decoder_width": 16, "model.decoder_depth": 1, "model.decoder_num_heads": 2,
    "train.steps": 6, "train.log_every_steps": 3,
}  # fmt: skip


ENVIRONMENT = os.environ | {
    "XLA_FLAGS": COMPILE_QUICKLY, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{WITHOUT_TORCH}:{ROOT}",
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}  # fmt: skip


def start(*arguments: str, under: tuple[str, ...] = (), **environment: str) -> subprocess.Popen:
    """Starts main.py with one CPU device and no terminal; `under`: the command that starts it, as `nice` does."""
    command = [*under, sys.executable, "main.py", *arguments]
    env = ENVIRONMENT | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Runs main.py to its end: exit code, standard output, standard error."""
    if environment:
        process = start(*arguments, **environment)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        warm = _warm_process()
        warm.stdin.write(json.dumps({"arguments": arguments, "out": str(out), "err": str(err)}) + "\n")
        warm.stdin.flush()
        return int(warm.stdout.readline()), out.read_text(), err.read_text()


@functools.cache
def _warm_process() -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.warm"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)


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


@contextlib.contextmanager
def compiling_once():
    """What one run inside has compiled, the next ones load."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for values in ((COMPILED.name, 0.0), before):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at its settings once
        if values is not before:
            yield


@contextlib.contextmanager
def one_device():
    """Compiling for one device, and computing on it, is quicker than for eight."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "devices", lambda *_: devices)
        yield


def run_task(name: str, workdir: Path, **settings) -> Path:
    """Runs configs/NAME.py in this process with settings given as train__steps=3; returns the workdir."""
    config = importlib.import_module(f"configs.{name}").get_config()
    values = {key: value for key, value in TINY_SETTINGS.items() if config.task in ("pretrain", "classify")}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    config.update_from_flattened_dict(values)
    task = check_task(config)
    workdir.mkdir(parents=True, exist_ok=True)
    with StopSignal() as stop:
        task.run(config, workdir, stop)
    return workdir


def mistake(name: str, workdir: Path, **settings) -> str:
    """The one line that tells the mistake of a run that is refused."""
    with pytest.raises(UserError) as error:
        run_task(name, workdir, **settings)
    assert "\n" not in str(error.value) and not (workdir / "result.json").exists()
    return str(error.value)
