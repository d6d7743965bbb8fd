"""An ablation whose runs are small programs, which fail, are killed and are stopped as real ones are."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import Stopped, StopSignal
from mae_jax.tasks.ablation import program as ablate
from mae_jax.tasks.ablation import report
from mae_jax.tasks.ablation.jobs import make_plan, read_outcome
from mae_jax.tasks.ablation.program import check_same_settings, explain
from tests.runs import read_json
from tests.tasks.test_grid import FINETUNE, ROOT, make_config, plan_of

# Notes that it was started, obeys what the folder `orders` says for its cell, and otherwise has a result.
RUN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1].split("=", 1)[1])
with (folder / "starts").open("a") as file: file.write("x")
order = folder.parents[2] / "orders" / f"{folder.parts[-3]}.{folder.name}"
if order.exists(): exec(order.read_text())
result = {"eval/loss": 0.5, "linear_probe/top1": 0.4} if folder.name == "pretrain" else {"eval/top1": 0.5}
print("all is well")
(folder / "result.json").write_text(json.dumps({"step": 3} | result))
"""
RATIOS = (("model.mask_ratio", (0.5, 0.75)),)


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    monkeypatch.setattr(ablate, "full_command", lambda run: [sys.executable, "-S", "-c", RUN, run.arguments[-1]])
    monkeypatch.setattr(ablate, "POLL_SECONDS", 0.01)
    # Without code between fork and exec, Python need not copy the tables of this process's memory for each run. The
    # test of an ablation that is killed has a process of its own, which has this code.
    monkeypatch.setattr(ablate, "LIBC", None)


def run(workdir, **settings):
    workdir.mkdir(exist_ok=True)
    settings = {"grid": RATIOS, "measure": (FINETUNE,), "scores": ("eval/loss", "finetune/top1")} | settings
    with StopSignal() as stop:
        ablate.run(make_config(**settings), workdir, stop)


def order(workdir, cell, code, name="pretrain"):
    """Makes the runs of a cell do something; None: nothing out of the ordinary any more."""
    path = workdir / "orders" / f"mask_ratio_{cell}.{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink() if code is None else path.write_text(code)


def starts(workdir, cell, name="pretrain", seed=0):
    path = workdir / f"mask_ratio_{cell}" / f"seed_{seed}" / name / "starts"
    return len(path.read_text()) if path.exists() else 0


def failures(workdir):
    return [row["failed"] for row in read_json(workdir / "result.json")["rows"]]


FAILURES = {
    "print('error: the loss is nan'); print('more'); sys.exit(1)": "the loss is nan",
    "os.kill(os.getpid(), signal.SIGKILL)": "killed by signal 9 (out of memory?)",
    "print('jaxlib: RESOURCE_EXHAUSTED: 12 GiB'); sys.exit(1)": "exit code 1: jaxlib: RESOURCE_EXHAUSTED: 12 GiB",
    "raise KeyError('unforeseen')": "exit code 1: KeyError: 'unforeseen'",
    "os._exit(0)": "it ended without a result",
}


@pytest.mark.parametrize("code", FAILURES)
def test_a_run_that_fails_is_told_in_its_row_and_the_others_go_on(tmp_path, capsys, code):
    order(tmp_path, 0.5, code)
    run(tmp_path)
    failed, good = failures(tmp_path)
    assert failed["seed 0"].startswith("pretrain: " + FAILURES[code]) and good == {}
    assert starts(tmp_path, 0.5, "finetune") == 0 and starts(tmp_path, 0.75, "finetune") == 1
    out = capsys.readouterr().out
    assert "[2/4] mask_ratio 0.5, seed 0: finetune left out" in out and "1 of 2 runs failed" in out
    assert "0.5 (failed)" in (tmp_path / "table.md").read_text()


def test_the_same_command_tries_only_what_failed_again(tmp_path, capsys):
    order(tmp_path, 0.5, "sys.exit(3)", "finetune")
    run(tmp_path)
    assert failures(tmp_path)[0] == {"seed 0": "finetune: exit code 3: it said nothing"}
    order(tmp_path, 0.5, None, "finetune")
    run(tmp_path)
    assert [starts(tmp_path, 0.5, name) for name in ("pretrain", "finetune")] == [1, 2]
    assert failures(tmp_path) == [{}, {}] and (tmp_path / "result.1.json").exists()
    capsys.readouterr()
    before = read_json(tmp_path / "result.json")
    run(tmp_path)
    assert "is finished: all 4 runs are done" in capsys.readouterr().out
    assert starts(tmp_path, 0.5, "finetune") == 2 and read_json(tmp_path / "result.json") == before


@pytest.mark.parametrize(
    "text", ["[1]", "null", '{"seconds": "9", "error": [1]}', '{"seconds": NaN, "error": {}}', "{"]
)
def test_notes_of_a_run_that_are_of_the_wrong_kind_are_as_none(tmp_path, text):
    for name in ("status.json", "result.json", "config.json"):
        (tmp_path / name).write_text(text)
    one = plan_of(grid=RATIOS).runs[0]._replace(folder=tmp_path)
    outcome = read_outcome(one)
    assert outcome.scores in (None, {}) and outcome.seconds is None and outcome.error is None
    check_same_settings(one)
    numbers = '"eval/loss": NaN, "knn/top1": "0.5", "rankme": 1' + 400 * "0" + ', "linear_probe/top1": 0.5'
    (tmp_path / "result.json").write_text(f'{{"step": 3, {numbers}}}')
    assert read_outcome(one).scores == {"linear_probe/top1": 0.5}


def test_what_stands_in_the_way_of_a_runs_files_is_found_before_any_run(tmp_path):
    folder = tmp_path / "mask_ratio_0.75" / "seed_0" / "finetune"
    folder.mkdir(parents=True)
    (folder / "log.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="log.txt is a link"):
        run(tmp_path)
    assert starts(tmp_path, 0.5) == 0 and not (tmp_path / "elsewhere").exists()


def test_each_run_leaves_its_command_its_output_and_its_time(tmp_path):
    run(tmp_path)
    folder = tmp_path / "mask_ratio_0.5" / "seed_0" / "pretrain"
    assert f"--workdir={folder}" in (folder / "command.txt").read_text()
    assert (folder / "log.txt").read_text() == "all is well\n"
    assert read_json(folder / "status.json")["seconds"] > 0
    (row, _) = read_json(tmp_path / "result.json")["rows"]
    assert row["cell"] == "mask_ratio 0.5" and row["settings"] == {"model.mask_ratio": 0.5} and row["seeds"] == [0]
    assert row["scores"]["finetune/top1"] == {"mean": 0.5, "std": None, "values": [0.5]}
    assert row.keys() == {"cell", "settings", "seeds", "scores", "train_gflop_per_image", "minutes", "failed"}


def test_a_protocols_score_is_never_taken_from_pretrainings_own_of_that_name(tmp_path):
    settings = dict(measure=(("linear_probe", "linear_probe_digits", ()),), scores=("linear_probe/top1",))
    order(tmp_path, 0.5, "sys.exit(1)", "linear_probe")
    run(tmp_path, **settings)
    rows = read_json(tmp_path / "result.json")["rows"]
    assert [row["scores"]["linear_probe/top1"]["values"] for row in rows] == [[], [0.5]]
    run(tmp_path, **settings | {"measure": ()})
    rows = read_json(tmp_path / "result.json")["rows"]
    assert [row["scores"]["linear_probe/top1"]["values"] for row in rows] == [[0.4], [0.4]]


def test_more_seeds_and_values_run_only_what_is_new(tmp_path):
    run(tmp_path)
    run(tmp_path, seeds=(0, 1), grid=(("model.mask_ratio", (0.25, 0.5)),))
    assert [starts(tmp_path, 0.5, seed=seed) for seed in (0, 1)] == [1, 1]
    assert [starts(tmp_path, 0.25, seed=seed) for seed in (0, 1)] == [1, 1] and starts(tmp_path, 0.75) == 1
    assert [row["cell"] for row in read_json(tmp_path / "result.json")["rows"]] == ["mask_ratio 0.25", "mask_ratio 0.5"]


def test_a_run_that_was_made_with_other_settings_is_not_mixed_in(tmp_path):
    run(tmp_path)
    config = make_config(grid=RATIOS)
    folder = tmp_path / "mask_ratio_0.5" / "seed_0" / "pretrain"
    made = json.loads(json.dumps(config.to_dict()))
    made.update(task="pretrain", data=made["data"] | {"num_threads": 3}, mesh=made["mesh"] | {"fsdp": 2})
    made["model"]["mask_ratio"] = 0.5
    (folder / "config.json").write_text(json.dumps(made))
    run(tmp_path)  # on other devices, with other readers: the same run
    made["train"]["epochs"] = 7.0
    (folder / "config.json").write_text(json.dumps(made))
    with pytest.raises(UserError) as error:
        run(tmp_path)
    for text in (str(folder), "train.epochs=7.0", str(config.train.epochs), "another --workdir"):
        assert text in str(error.value)


def test_what_a_run_settles_itself_or_takes_from_its_checkpoint_is_no_other_setting(tmp_path):
    measured = ("finetune", "finetune_vit_base", (("data.batch_size", None),))
    config = make_config(grid=RATIOS, measure=(measured,))
    first, then = [one for one in make_plan(config, tmp_path).runs if one.cell == "mask_ratio 0.5"]
    for one, settled in ((first, {}), (then, {"image_size": 8})):
        made = json.loads(json.dumps(one.config.to_dict()))
        one.config.model.dtype = None
        made["model"] |= {"dtype": "float32", "attention": "xla"} | settled
        made["data"] |= {"batch_size": 64, "mean": [0.3]} if one is then else {}
        one.folder.mkdir(parents=True)
        (one.folder / "config.json").write_text(json.dumps(made))
        check_same_settings(one)
        made["optimizer"]["clip_norm"] = 1.0
        (one.folder / "config.json").write_text(json.dumps(made))
        with pytest.raises(UserError, match="optimizer.clip_norm=1.0, now it is None"):
            check_same_settings(one)


def test_a_run_that_another_process_works_on_is_neither_failed_nor_finished(tmp_path, capsys):
    order(tmp_path, 0.5, "print(f'error: --workdir={folder} is in use by process 7 on host'); sys.exit(2)")
    run(tmp_path)
    assert "another process is working on it" in capsys.readouterr().out
    assert not (tmp_path / "result.json").exists() and "0.5 (missing)" in (tmp_path / "table.md").read_text()
    order(tmp_path, 0.5, None)
    run(tmp_path)
    assert failures(tmp_path) == [{}, {}]


@pytest.mark.parametrize("grid, title", [(RATIOS, "mask ratio"), ((("model.decoder_depth", (1, 2)),), "")])
def test_the_papers_curves_stand_beside_the_axis_that_they_are_of_and_no_other(tmp_path, monkeypatch, grid, title):
    drawn = []
    monkeypatch.setattr(report, "draw", lambda *parts: drawn.append(parts) or np.zeros((2, 2, 3), np.uint8))
    run(tmp_path, grid=grid, plot=("eval/loss",))
    ((_, papers, _, found, source),) = drawn
    assert (found, len(papers), bool(source)) == (title, 2 if title else 0, bool(title))


def test_one_shard_has_one_lock_however_it_is_counted_and_others_have_others():
    names = [ablate.lock_name(make_config(shard=shard)) for shard in ("0/4", "4/4", "1/4", None)]
    assert names[0] == names[1] and len(set(names)) == 3


def test_shards_in_one_folder_end_with_the_whole_table(tmp_path, capsys):
    run(tmp_path, shard="1/2", seeds=(0, 1))
    assert not (tmp_path / "result.json").exists() and (tmp_path / "table.md").exists()
    assert "2 of 2 cells are incomplete" in capsys.readouterr().out
    run(tmp_path, shard="2/2", seeds=(0, 1))
    rows = read_json(tmp_path / "result.json")["rows"]
    assert [len(row["scores"]["finetune/top1"]["values"]) for row in rows] == [2, 2]
    assert all(starts(tmp_path, ratio, seed=seed) == 1 for ratio in (0.5, 0.75) for seed in (0, 1))


SAVES = """
def save(number, frame):
    (folder / "saved").write_text(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
if not (folder / "saved").exists():
    os.kill(os.getppid(), int((folder.parents[2] / "orders" / "number").read_text()))
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_and_waits_until_the_run_has_saved(tmp_path, number):
    order(tmp_path, 0.5, SAVES)
    (tmp_path / "orders" / "number").write_text(str(int(number)))
    with pytest.raises(Stopped):
        run(tmp_path)
    folder = tmp_path / "mask_ratio_0.5" / "seed_0" / "pretrain"
    assert (folder / "saved").read_text() == str(int(number))
    assert read_json(folder / "status.json")["error"] is None and starts(tmp_path, 0.75) == 0
    run(tmp_path)  # goes on where it was
    assert starts(tmp_path, 0.5) == 2 and failures(tmp_path) == [{}, {}]


PARENT = """
import pathlib, sys
from mae_jax.runtime.signals import StopSignal
from mae_jax.tasks.ablation import program as runs
run = runs.Run("pretrain", "a cell", 0, pathlib.Path(sys.argv[1]), None, (), None)
runs.full_command = lambda run: [sys.executable, "-c", sys.argv[2], str(run.folder / "saved")]
runs.execute(run, StopSignal())
"""
CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(143)))
print("up", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_run_whose_ablation_is_killed_is_told_to_stop(tmp_path):
    command = [sys.executable, "-c", PARENT, str(tmp_path), CHILD]
    process = subprocess.Popen(command, cwd=ROOT)
    wait_until(lambda: (tmp_path / "log.txt").exists() and (tmp_path / "log.txt").read_text() == "up\n")
    process.kill()
    process.wait()
    wait_until((tmp_path / "saved").exists)


def wait_until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_why_a_run_ended_is_its_last_error_line():
    said = ["error: first", "error: --workdir=x is in use", ""]
    assert explain(2, said) == "--workdir=x is in use"
    assert explain(143, ["stopped"]).startswith("stopped by signal 15")
    assert explain(-signal.SIGSEGV, said[2:]) == "killed by signal 11"


def test_only_the_last_attempts_lines_say_why_it_failed(tmp_path):
    order(tmp_path, 0.5, "print('error: early'); sys.exit(1)")
    run(tmp_path)
    assert failures(tmp_path)[0] == {"seed 0": "pretrain: early"}
    order(tmp_path, 0.5, "sys.exit(1)")
    run(tmp_path)
    assert failures(tmp_path)[0] == {"seed 0": "pretrain: exit code 1: it said nothing"}
