"""Runs that are killed, stopped, finished or lengthened, started as users start them."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import COMPILE_QUICKLY
from tests.runs import ROOT, TINY, losses, read_checkpoint, read_json, run, start

pytestmark = pytest.mark.slow
ARGUMENTS = (*TINY, "--config.train.steps=60", "--config.checkpoint.every_steps=7", "--config.evaluate.every_steps=20")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("unbroken")
    code, out, err = run(*ARGUMENTS, f"--workdir={workdir}")
    assert code == 0, out + err
    return workdir


def wait_for_step(process, workdir, step):
    """Returns when the run has reported `step`."""
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and any(line_step >= step for line_step, _ in complete_losses(metrics)):
            return
        time.sleep(0.01)


def complete_losses(metrics):
    lines = metrics.read_text().split("\n")[:-1]
    return [(line["step"], line.get("train/loss")) for line in map(json.loads, lines)]


def assert_same_end(workdir, unbroken):
    ours, theirs = read_checkpoint(workdir, 60), read_checkpoint(unbroken, 60)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert read_json(workdir / "result.json") == read_json(unbroken / "result.json")
    assert losses(workdir) == losses(unbroken)
    evaluated = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluated if "eval/loss" in line] == [20, 40, 60]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits_as_an_unbroken_one(tmp_path, unbroken):
    moments = random.Random(0)
    for kill_after in (15, 40):
        process = start(*ARGUMENTS, f"--workdir={tmp_path}")
        wait_for_step(process, tmp_path, kill_after)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
        assert not (tmp_path / "result.json").exists()
    code, out, err = run(*ARGUMENTS, f"--workdir={tmp_path}")
    assert code == 0, out + err
    assert "going on from checkpoint" in out
    assert_same_end(tmp_path, unbroken)


def test_sigterm_saves_the_step_that_was_reached_exits_143_and_the_same_command_goes_on(tmp_path, unbroken):
    process = start(*ARGUMENTS, f"--workdir={tmp_path}")
    wait_for_step(process, tmp_path, 10)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    stopped_at = int(out.rsplit("stopped by a signal at step ", 1)[1].split(";")[0])
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir()
    code, out, err = run(*ARGUMENTS, f"--workdir={tmp_path}")
    assert code == 0, out + err
    assert f"going on from checkpoint {stopped_at}" in out
    assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize("moment", ["mesh ", "step 60/60"])
def test_sigterm_while_compiling_or_while_measuring_at_the_end_exits_143_too(tmp_path, unbroken, moment):
    if moment == "step 60/60":  # its last steps are enough
        shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "checkpoints" / "60")
        (tmp_path / "result.json").unlink()
    process = start(*ARGUMENTS, f"--workdir={tmp_path}", JAX_ENABLE_COMPILATION_CACHE="false")
    while moment not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    assert "Traceback" not in err and "Fatal" not in err
    code, out, err = run(*ARGUMENTS, f"--workdir={tmp_path}")
    assert code == 0, out + err
    assert_same_end(tmp_path, unbroken)


def test_a_damaged_newest_checkpoint_is_one_line_that_says_how_to_use_the_one_before(tmp_path, unbroken):
    shutil.copytree(unbroken, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    for file in (tmp_path / "run" / "checkpoints" / "60" / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:10])
    code, _, err = run(*ARGUMENTS, f"--workdir={tmp_path}/run")
    assert code == 2 and err.count("\n") == 1 and "move it away" in err
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
    code, out, err = run(*ARGUMENTS, f"--workdir={tmp_path}/run")
    assert code == 0, out + err
    assert_same_end(tmp_path / "run", unbroken)


def test_a_model_that_two_devices_trained_loads_on_one_and_goes_on_there(tmp_path):
    two = {"XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {COMPILE_QUICKLY}"}
    code, out, err = run(*TINY, "--config.train.steps=4", f"--workdir={tmp_path}", **two)
    assert code == 0 and "data 2" in out, out + err
    program = f"import mae_jax, jax.numpy as j; print(mae_jax.load('{tmp_path}').encode(j.ones((1, 8, 8, 1))).shape)"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert loaded.stdout.strip() == "(1, 17, 16)", loaded.stderr
    code, out, err = run(*TINY, "--config.train.steps=60", f"--workdir={tmp_path}")  # other tests have compiled it
    assert code == 0 and "going on from checkpoint 4" in out, out + err


def test_a_finished_run_says_so_and_changes_nothing(unbroken):
    def state():
        return {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}

    before = state()
    code, out, err = run(*ARGUMENTS, f"--workdir={unbroken}")
    assert code == 0, err
    assert "is finished" in out
    assert state() == before


def test_a_checkpoint_of_another_model_is_refused_with_the_setting_that_differs(unbroken):
    code, out, err = run(*ARGUMENTS, f"--workdir={unbroken}", "--config.model.width=32")
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "model.width=16, this run model.width=32" in err
    assert "compiled" not in out


def test_fewer_steps_than_are_done_already_are_refused(unbroken):
    code, _, err = run(*ARGUMENTS, f"--workdir={unbroken}", "--config.train.steps=50")
    assert code == 2
    assert "is at step 60 already" in err


def test_only_the_last_checkpoints_and_every_mth_are_kept(unbroken):
    steps = sorted(int(path.name) for path in (unbroken / "checkpoints").iterdir())
    assert steps == [49, 56, 60]


def test_weights_of_a_run_start_another_one(tmp_path, unbroken):
    code, out, err = run(
        *TINY, f"--workdir={tmp_path}", f"--config.init_from={unbroken}",
        "--config.train.steps=1", "--config.optimizer.base_learning_rate=0.0", "--config.seed=1",
    )  # fmt: skip
    assert code == 0, out + err
    ours, theirs = read_checkpoint(tmp_path, 1), read_checkpoint(unbroken, 60)
    for name in ours:
        if name.startswith("params"):  # a step with rate 0 leaves them as they were
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
