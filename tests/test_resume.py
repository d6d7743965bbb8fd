"""Runs that are killed, stopped, finished or lengthened, started as users start them."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.full_disk import fill, small_disk
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


STALLED = """
import itertools, os
from configs.digits import get_config
from mae_jax.data.sources import Digits

def read_slowly(self, index):
    if next(count) == 500:
        open(os.path.dirname(__file__) + "/pipe").read()  # nobody writes into it
    return read(self, index)

count, read, Digits.__getitem__ = itertools.count(), Digits.__getitem__, read_slowly
"""


def test_sigterm_saves_the_step_that_was_reached_exits_143_and_the_same_command_goes_on(tmp_path, unbroken):
    # Here it comes while the run waits for a disk that does not answer, as a reader's thread does for ever.
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stalled.py").write_text(STALLED)
    stalled = (f"--config={tmp_path}/stalled.py", *ARGUMENTS[1:], "--config.data.on_device=False")
    process = start(*stalled, f"--workdir={tmp_path}")
    wait_for_step(process, tmp_path, 10)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
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


def test_a_damaged_newest_checkpoint_is_told_set_aside_and_the_one_before_is_used(tmp_path, unbroken):
    shutil.copytree(unbroken, tmp_path / "run")
    data = next((tmp_path / "run" / "checkpoints" / "60" / "params" / "d").iterdir())
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    code, _, err = run(*TINY, f"--config.init_from={tmp_path}/run", "--config.train.steps=1", f"--workdir={tmp_path}/2")
    assert code == 2 and err.count("\n") == 1, err
    assert "checkpoints/60 is damaged: params/d/" in err and err.endswith("run/checkpoints/56\n")
    code, out, err = run(*ARGUMENTS, f"--workdir={tmp_path}/run")
    assert code == 0, out + err
    assert out.startswith(
        f"checkpoint 60 is damaged: params/d/{data.name} has other bytes than were written; moved to "
    )
    assert "\ngoing on from checkpoint 56\n" in out
    assert (tmp_path / "run" / "checkpoints_set_aside" / "60").is_dir()
    assert_same_end(tmp_path / "run", unbroken)


@pytest.fixture
def small_files():
    """What `start` needs so that writes beyond the first 20 KB of a file fail, as on a full disk: checkpoints' do.

    (Orbax describes a checkpoint in files of 24 and 27 KB. In how many it puts arrays is a matter of moments.)
    """
    if not shutil.which("prlimit"):
        pytest.skip("there is no prlimit")
    return {"under": ("prlimit", "--fsize=20000"), "JAX_ENABLE_COMPILATION_CACHE": "false"}


def test_sigterm_when_the_state_cannot_be_saved_is_code_1_and_the_same_command_goes_on(tmp_path, unbroken, small_files):
    shutil.copytree(unbroken / "checkpoints" / "49", tmp_path / "checkpoints" / "49")
    lines = (unbroken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 49))
    arguments = (*ARGUMENTS, "--config.train.steps=100000", "--config.checkpoint.every_steps=100000")
    process = start(*arguments, f"--workdir={tmp_path}", **small_files)
    wait_for_step(process, tmp_path, 55)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    # Before and after it Orbax's threads and Python's end may print words of their own.
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: checkpoint ") and "cannot be saved: File too large; " in error
    assert error.endswith("; then the same command resumes from checkpoint 49")
    code, out, err = run(*ARGUMENTS, f"--workdir={tmp_path}")
    assert code == 0, out + err
    assert_same_end(tmp_path, unbroken)


def test_a_full_disk_ends_the_run_with_code_1_and_one_line_and_the_same_command_goes_on(tmp_path, unbroken):
    with small_disk(tmp_path / "disk", "4m"):
        workdir, filler = tmp_path / "disk" / "run", tmp_path / "disk" / "filler"
        workdir.mkdir()
        for name in ("checkpoints/49", "config.json", "metrics.jsonl"):
            copy = shutil.copytree if name.startswith("checkpoints") else shutil.copy
            copy(unbroken / name, workdir / name)
        process = start(*ARGUMENTS, f"--workdir={workdir}")
        while "first step after" not in process.stdout.readline():
            assert process.poll() is None
        fill(filler)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 1 and err.count("\n") == 1, out + err
        assert re.fullmatch("error: .*: No space left on device.*; free space .* the same command resumes .*\n", err)
        filler.unlink()
        code, out, err = run(*ARGUMENTS, f"--workdir={workdir}")
        assert code == 0 and "going on from checkpoint" in out, out + err
        assert_same_end(workdir, unbroken)


def test_a_model_that_two_devices_trained_loads_on_one_and_goes_on_there(tmp_path):
    code, out, err = run(*TINY, "--config.train.steps=4", "--config.mesh.cpu_devices=2", f"--workdir={tmp_path}")
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
