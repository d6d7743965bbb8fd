"""A tiny autoencoder that was really trained, and a way to run tasks in this process, on its eight devices."""

import importlib
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import StopSignal
from mae_jax.settings.checks import check
from mae_jax.tasks import find_task
from tests.runs import COMPILED

TINY = {
    "model.width": 16, "model.depth": 2, "model.num_heads": 2,
    "model.decoder_width": 16, "model.decoder_depth": 1, "model.decoder_num_heads": 2,
    "train.steps": 6, "train.log_every_steps": 3,
}  # fmt: skip


@pytest.fixture(scope="package", autouse=True)
def compile_once():
    """Many runs here have the same programs: what one has compiled, the next ones load."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for values in ((COMPILED.name, 0.0), before):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # it looks at its settings once
        if values is not before:
            yield


def run_task(name: str, workdir: Path, **settings) -> Path:
    """Runs configs/NAME.py with settings given as train__steps=3; returns the workdir."""
    config = importlib.import_module(f"configs.{name}").get_config()
    values = {key: value for key, value in TINY.items() if config.task in ("pretrain", "classify")}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    config.update_from_flattened_dict(values)
    check(config)
    workdir.mkdir(parents=True, exist_ok=True)
    with StopSignal() as stop:
        find_task(config.task).run(config, workdir, stop)
    return workdir


def mistake(name: str, workdir: Path, **settings) -> str:
    """The one line that tells the mistake of a run that is refused."""
    with pytest.raises(UserError) as error:
        run_task(name, workdir, **settings)
    assert "\n" not in str(error.value) and not (workdir / "result.json").exists()
    return str(error.value)


@pytest.fixture(scope="package")
def pretrained(compile_once, tmp_path_factory) -> Path:
    """The workdir of a pre-training run, evaluated twice."""
    workdir = tmp_path_factory.mktemp("runs") / "pretrained"
    return run_task("digits", workdir, train__steps=40, evaluate__every_steps=20)


@pytest.fixture(scope="package")
def finetuned(pretrained, tmp_path_factory) -> Path:
    """The workdir of a fine-tuning run with a moving average."""
    workdir = tmp_path_factory.mktemp("runs") / "finetuned"
    return run_task("finetune_digits", workdir, init_from=str(pretrained), train__ema_decay=0.5)
