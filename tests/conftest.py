"""Every test runs on a CPU that pretends to be eight devices; most use only the first."""

import gc
import importlib.metadata
import os
import tempfile
from pathlib import Path

import pytest

# Compiling is most of what the tests wait for, so little is optimised, and not in pieces, each of which costs its own.
COMPILE_QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    COMPILE_QUICKLY += " --xla_cpu_use_fusion_emitters=false"

# Both must be set before jax is imported; flags of the environment come last and win.
FLAGS = f"--xla_force_host_platform_device_count=8 {COMPILE_QUICKLY}"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No test, nor a process that it starts, looks into its user's cache.
CACHE = tempfile.TemporaryDirectory(prefix="cache_")
os.environ["XDG_CACHE_HOME"] = CACHE.name

from configs import common  # noqa: E402
from mae_jax.settings.fields import use_defaults  # noqa: E402

use_defaults(common.get_config)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """The workdir of a tiny autoencoder's pre-training run, evaluated twice."""
    from tests.runs import compiling_once, one_device, run_task

    with compiling_once(), one_device():
        workdir = tmp_path_factory.mktemp("runs") / "pretrained"
        return run_task("digits", workdir, train__steps=40, evaluate__every_steps=20)


@pytest.fixture(scope="session")
def finetuned(pretrained, tmp_path_factory) -> Path:
    """The workdir of a fine-tuning run with a moving average."""
    from tests.runs import compiling_once, one_device, run_task

    with compiling_once(), one_device():
        workdir = tmp_path_factory.mktemp("runs") / "finetuned"
        return run_task("finetune_digits", workdir, init_from=str(pretrained), train__ema_decay=0.5)


def pytest_collection_finish():
    """What was imported is not garbage: looking through it at every turn takes a fifth of the time of JAX's tracing."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(items):
    """Files of whole runs come first, so that at the end no core waits for another one's long file."""
    items.sort(key=lambda item: "slow" not in [mark.name for mark in item.getparent(pytest.Module).own_markers])
