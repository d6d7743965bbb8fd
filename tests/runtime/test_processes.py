"""Runs of several processes, which stand for hosts: one folder, one loopback network, devices of their own."""

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest

from mae_jax.evaluation.feature_table import read_features
from tests.digit_files import write_digits
from tests.processes import (
    by_flags,
    by_open_mpi,
    by_slurm,
    run_processes,
    start_processes,
    wait_for_end,
    wait_for_step,
)
from tests.runs import TINY, losses, read_json, run

pytestmark = pytest.mark.slow
ARGUMENTS = (
    *TINY,
    "--config.train.steps=24",
    "--config.train.log_every_steps=1",
    "--config.evaluate.every_steps=20",
    "--config.evaluate.linear_probe=False",
    "--config.evaluate.max_train_examples=300",
    "--config.checkpoint.every_steps=5",
    "--config.optimizer.schedule=constant",  # so that runs of any length share their compiled step
    "--config.optimizer.warmup_epochs=0",
)
LONG = (*ARGUMENTS, "--config.train.steps=2000", "--config.evaluate.every_steps=2000")
BOUND = 30  # seconds in which all processes end after one has


def own_words(out):
    """Standard output without what Gloo prints."""
    return [line for line in out.splitlines() if "Gloo" not in line and "peer ranks" not in line]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The workdir of a run in one process with all four devices."""
    workdir = tmp_path_factory.mktemp("one")
    ((code, out, err),) = run_processes(1, *ARGUMENTS, f"--workdir={workdir}", devices=4)
    assert code == 0, out + err
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Workdir and output of the same run in two processes."""
    workdir = tmp_path_factory.mktemp("two")
    ended = run_processes(2, *ARGUMENTS, f"--workdir={workdir}")
    assert [code for code, _, _ in ended] == [0, 0], ended
    return workdir, ended


def assert_same_losses(workdir, one):
    ours, theirs = losses(workdir), losses(one)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    assert ours[0][1] == pytest.approx(theirs[0][1], rel=1e-6)
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-4)


def assert_same_result(workdir, one):
    ours, theirs = read_json(workdir / "result.json"), read_json(one / "result.json")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        counts = name.endswith("top1")
        assert ours[name] == (expected if counts or isinstance(expected, str) else pytest.approx(expected, rel=1e-4))


def test_two_processes_have_the_losses_and_scores_of_one(one, two):
    assert_same_losses(two[0], one)
    assert_same_result(two[0], one)
    evaluated = [
        [line for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()) if "eval/loss" in line]
        for workdir in (one, two[0])
    ]
    assert [line["step"] for line in evaluated[1]] == [20, 24]
    for ours, theirs in zip(*evaluated, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_two_processes_write_one_set_of_files_and_one_prints(one, two):
    def names(workdir):
        files = (str(path.relative_to(workdir)) for path in workdir.rglob("*") if "checkpoints" not in path.parts)
        return sorted(re.sub(r"tfevents.*", "tfevents", name) for name in files)

    workdir, ended = two
    assert names(workdir) == names(one)
    (_, out, err), (_, other_out, other_err) = ended
    assert err == other_err == other_out == ""
    assert sum(line.startswith("done: 24 steps") for line in own_words(out)) == 1 and "2 process" in out


def test_two_processes_write_the_features_of_one_and_name_the_bad_pictures_of_both(one, tmp_path):
    write_digits(tmp_path, 24, lambda n, digit: "pictures")
    for n in (1, 20):  # in batches of 8, the first is read by one process, the second by the other
        (tmp_path / f"pictures/{n:02}.png").write_bytes(b"")
    arguments = ("--config=configs/features.py", f"--config.init_from={one}", "--config.data.name=image_folder",
                 f"--config.data.path={tmp_path}/pictures", "--config.evaluate.batch_size=8")  # fmt: skip
    found = []
    for count in (1, 2):
        ended = run_processes(count, *arguments, f"--workdir={tmp_path}/{count}")
        assert [code for code, _, _ in ended] == [0] * count, ended
        found.append(read_features(tmp_path / str(count)))
        left_out = read_json(tmp_path / str(count) / "result.json")["left_out"]
        assert [bad["file"][-6:] for bad in left_out] == ["01.png", "20.png"]
    assert found[0].files == found[1].files and len(found[0].files) == 22
    np.testing.assert_allclose(*(table.vectors for table in found), atol=1e-5)


def test_a_run_that_is_finished_says_so_in_any_number_of_processes(two):
    ended = run_processes(2, *ARGUMENTS, f"--workdir={two[0]}")
    assert [code for code, _, _ in ended] == [0, 0] and "is finished" in ended[0][1], ended


def test_a_signal_to_one_process_stops_all_at_one_step_and_other_numbers_of_processes_go_on(one, tmp_path):
    shutil.copytree(one, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("result.json", "20", "24"))
    lines = (one / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 15))
    processes = start_processes(2, *ARGUMENTS, f"--workdir={tmp_path}")
    wait_for_step(processes, tmp_path, 17)
    processes[1].send_signal(signal.SIGTERM)
    ended = wait_for_end(processes, timeout=120)
    assert [code for code, _, _ in ended] == [143, 143], ended
    assert all("SIGTERM caught" in line for _, _, err in ended for line in err.splitlines())  # JAX notes it
    out = ended[0][1]
    assert "going on from checkpoint 15" in out
    stopped_at = int(re.search(r"stopped by a signal at step (\d+); everything is saved", out)[1])
    assert (tmp_path / "checkpoints" / str(stopped_at)).is_dir() and stopped_at < 24
    ((code, out, err),) = run_processes(1, *ARGUMENTS, f"--workdir={tmp_path}", devices=4)
    assert code == 0 and f"going on from checkpoint {stopped_at}" in out, out + err
    assert_same_losses(tmp_path, one)
    assert_same_result(tmp_path, one)


def assert_ends_when_killed(processes, victim):
    """Kills one process; the other must say so and end soon."""
    processes[victim].kill()
    start = time.monotonic()
    ended = wait_for_end(processes, timeout=BOUND)
    assert time.monotonic() - start < BOUND
    assert_says_that_another_was_lost(ended[1 - victim])


def assert_says_that_another_was_lost(ended):
    """On a busy machine JAX's own end, with a dump and the same reason, may come first."""
    code, _, err = ended
    assert (code == 1 and "another process was lost" in err) or (
        code == -signal.SIGABRT and ("another task died" in err or "leader" in err)
    ), ended


def test_the_other_process_ends_when_the_first_is_killed(tmp_path):
    processes = start_processes(2, *LONG, f"--workdir={tmp_path}")
    wait_for_step(processes, tmp_path, 10)
    assert_ends_when_killed(processes, victim=0)


def test_a_run_whose_port_another_one_has_ends_with_a_line_each_and_the_other_goes_on_until_one_is_killed(tmp_path):
    places = by_flags(2)
    processes = start_processes(2, *LONG, f"--workdir={tmp_path}/old", launcher=lambda _: places)
    wait_for_step(processes, tmp_path / "old", 5)
    newcomers = run_processes(2, *LONG, f"--workdir={tmp_path}/new", launcher=lambda _: places)
    assert [code for code, _, _ in newcomers] == [2, 2], newcomers
    for (_, _, err), expected in zip(
        newcomers, ("Address already in use", "another run or program listens"), strict=True
    ):
        assert expected in err and err.startswith("error: process ") and err.count("\n") == 1
    assert [process.poll() for process in processes] == [None, None] and not (tmp_path / "new").exists()
    assert_ends_when_killed(processes, victim=1)


@pytest.mark.parametrize("launcher", [by_slurm, by_open_mpi])
def test_a_mistake_that_one_process_finds_ends_all_with_code_2_and_a_line_each(tmp_path, launcher):
    (tmp_path / "file").touch()
    workdirs = [f"--workdir={tmp_path}", f"--workdir={tmp_path}/file/run"]
    start = time.monotonic()
    ended = run_processes(2, *ARGUMENTS, workdirs, launcher=launcher)
    assert time.monotonic() - start < 2 * BOUND
    mistake = f"{workdirs[1]} cannot be written: "
    for (code, out, err), beginning in zip(ended, ("error: process 1 failed: ", "error: "), strict=True):
        assert code == 2 and err.startswith(beginning + mistake) and err.count("\n") == 1, ended
        assert "compiled" not in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--config.train.log_every_steps=1", "--config.train.log_every_steps=2"],
            "train.log_every_steps=2 in process 1, but 1 in process 0: all processes need the same command",
        ),
        (
            ["--workdir={}/a", "--workdir={}/b"],
            "/b of process 1 is not that of process 0: give a folder",
        ),
    ],
)
def test_processes_with_different_commands_or_workdirs_are_refused(tmp_path, arguments, expected):
    own = [argument.format(tmp_path) for argument in arguments]
    ended = run_processes(2, *TINY, f"--workdir={tmp_path}", own)
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert all(expected in err and err.count("\n") == 1 for _, _, err in ended)


def test_an_error_in_one_process_has_its_traceback_there_and_ends_all(tmp_path):
    culprit = 1
    (tmp_path / "faulty.py").write_text(FAULTY)
    configs = ["--config=configs/digits.py"] * 2
    configs[culprit] = f"--config={tmp_path}/faulty.py"
    ended = run_processes(2, configs, *LONG[1:], f"--workdir={tmp_path}/run")
    assert ended[culprit][0] == 1, ended
    assert "in __next__" in ended[culprit][2] or "in fail" in ended[culprit][2]
    assert ended[culprit][2].endswith("RuntimeError: no more pictures\n")
    assert_says_that_another_was_lost(ended[1 - culprit])


FAULTY = """
import itertools
from configs.digits import get_config
from mae_jax.data.loader import Batches
from mae_jax.runtime import processes

processes.TOLD_SECONDS = 2  # of 20, for which the test would wait

def fail(batches):
    if next(count) == 8:
        raise RuntimeError("no more pictures")
    return take(batches)

count, take, Batches.__next__ = itertools.count(), Batches.__next__, fail
"""


def test_a_mistake_in_the_flags_of_processes_is_one_line(tmp_path):
    code, out, err = run(*ARGUMENTS, f"--workdir={tmp_path}", "--process_count=2")
    assert code == 2 and out == "" and err.startswith("error: --coordinator and --process_index missing")
    assert err.count("\n") == 1
