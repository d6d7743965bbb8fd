"""What a start has to wait for."""

import subprocess
import sys

import pytest

from mae_jax.runtime import timing
from mae_jax.runtime.timing import Startup
from tests.runs import ROOT

# Each takes from a fifth of a second to several, and is needed by some runs only, or after the first step.
LATE = (
    "torch",
    "tensorflow",
    "tensorboardX",
    "tensorflow_datasets",
    "transformers",
    "sklearn",
    "scipy.stats",
    "matplotlib",
    "pandas",
)
# Tasks that were not asked for.
OTHER_TASKS = ("ablation", "evaluate", "export", "frozen", "measuring")


def test_what_a_run_imports_before_its_first_step_leaves_out_what_it_can_do_without():
    code = "import sys, main; from configs import digits; main.check_task(digits.get_config()); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    imported = set(done.stdout.split())
    assert "jax" in imported and "mae_jax.objectives.pretrain" in imported
    assert not imported & {*LATE, *(f"mae_jax.tasks.{task}" for task in OTHER_TASKS)}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock[0]` is what it shows."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_phases_that_come_again_add_up_and_what_is_in_none_is_other(clock):
    clock[0] = 102.5
    start = Startup(began=100.0)
    with start.phase("compile"):
        clock[0] += 3
    clock[0] += 1
    with start.phase("compile"):
        clock[0] += 0.5
    start.add("data", 0.25)
    clock[0] += 0.5
    expected = "  start     imports 2.5 s, data 0.2 s, compile 3.5 s, other 1.2 s: first step after 7.5 s"
    assert start.describe() == expected


def test_a_start_without_a_beginning_of_its_own_begins_now(clock):
    start = Startup()
    clock[0] += 2
    assert start.describe().startswith("  start     imports 0.0 s") and start.describe().endswith("after 2.0 s")
