"""A whole ablation of a tiny autoencoder by the command line: stopped, started again, and at its end."""

import signal
import time
from pathlib import Path

import pytest

from tests.runs import read_json, run, start

pytestmark = pytest.mark.slow
TINY = (
    "--config=configs/ablations/mask_ratio.py:digits",
    "--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2",
    "--config.model.decoder_width=16", "--config.model.decoder_depth=1", "--config.model.decoder_num_heads=2",
    "--config.model.scan_unroll=1", "--config.evaluate.max_train_examples=100", "--config.train.log_every_steps=5",
    "--config.checkpoint.every_steps=100", "--config.ablate.seeds=(3,)",
)  # fmt: skip
GRID = '--config.ablate.grid=(("finetune.classifier.trained_blocks",(1.0,)),)'
FINETUNE = '--config.ablate.measure=(("finetune","finetune_digits",(("train.steps",3),)),)'
RATIOS = '--config.ablate.grid=(("model.mask_ratio",(0.5,0.75)),)'


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Workdir and outputs of an ablation that was stopped in its first run, and then made to its end."""
    workdir = tmp_path_factory.mktemp("runs") / "ablation"
    arguments = (*TINY, GRID, FINETUNE, "--config.train.steps=300", f"--workdir={workdir}")
    process = start(*arguments)
    wait_for(workdir / "all_cells" / "seed_3" / "pretrain" / "log.txt", "step   5/300")
    process.send_signal(signal.SIGTERM)
    stopped, err = process.communicate(timeout=120)
    assert process.returncode == 143, stopped + err
    saved = sorted(path.name for path in (workdir / "all_cells/seed_3/pretrain/checkpoints").iterdir())
    code, out, err = run(*arguments)
    assert code == 0 and err == "", out + err
    return workdir, stopped, saved, out


def test_sigterm_stops_the_run_under_way_when_it_has_saved_and_the_same_command_goes_on(finished):
    workdir, stopped, saved, _ = finished
    assert saved and "stopped; " in stopped
    log = (workdir / "all_cells/seed_3/pretrain/log.txt").read_text()
    assert f"going on from checkpoint {max(map(int, saved))}" in log


def test_it_ends_with_a_table_of_what_its_runs_measured(finished):
    workdir, _, _, out = finished
    assert "[2/2] trained_blocks 1.0, seed 3: finetune" in out and "finetune/top1 %" in out
    assert (workdir / "table.md").read_text() in out and (workdir / "plot.png").exists()
    pretrained = read_json(workdir / "all_cells/seed_3/pretrain/result.json")
    assert not any(name.startswith("random_encoder/") for name in pretrained)  # evaluate.random_encoder is False
    finetuned = read_json(workdir / "trained_blocks_1.0/seed_3/finetune/result.json")
    (row,) = read_json(workdir / "result.json")["rows"]
    assert row["scores"]["linear_probe/top1"]["values"] == [pretrained["linear_probe/top1"]]
    assert row["scores"]["finetune/top1"]["values"] == [finetuned["eval/top1"]]
    assert row["failed"] == {} and row["minutes"] > 0


def test_its_runs_are_ordinary_ones_with_the_cells_settings_and_seed(finished):
    workdir = finished[0]
    config = read_json(workdir / "all_cells/seed_3/pretrain/config.json")
    assert (config["task"], config["train"]["steps"], config["ablate"]["grid"]) == ("pretrain", 300, [])
    assert (config["seed"], config["data"]["seed"]) == (3, 3)
    config = read_json(workdir / "trained_blocks_1.0/seed_3/finetune/config.json")
    assert config["init_from"] == f"{workdir}/all_cells/seed_3/pretrain"
    assert (config["seed"], config["classifier"]["trained_blocks"], config["train"]["steps"]) == (3, 1.0, 3)


def test_a_dry_run_lists_the_commands_and_makes_no_folder(tmp_path):
    code, out, err = run(*TINY, RATIOS, FINETUNE, "--dry_run", f"--workdir={tmp_path}/run")
    assert code == 0 and err == "" and not (tmp_path / "run").exists()
    lines = out.splitlines()
    assert len(lines) == 4 and "--config.task=pretrain" in lines[0] and "--config.model.mask_ratio=0.75" in lines[2]
    assert lines[3].endswith(f"--workdir={tmp_path}/run/mask_ratio_0.75/seed_3/finetune")


def test_the_ablation_itself_never_asks_jax_for_a_device_and_tells_runs_that_get_none(tmp_path):
    grid = '--config.ablate.grid=(("model.mask_ratio",(0.5,)),)'
    code, out, err = run(*TINY, grid, f"--workdir={tmp_path}", JAX_PLATFORMS="nonesuch")
    assert code == 0 and err == "", out + err
    (row,) = read_json(tmp_path / "result.json")["rows"]
    assert "nonesuch" in row["failed"]["seed 3"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--coordinator=localhost:1234", "--process_count=2", "--process_index=0"], "--config.shard=0/N"),
        ([RATIOS, FINETUNE, "--config.seed=1"], "ablate.seeds='(1,)'"),
    ],
)  # fmt: skip
def test_a_mistake_ends_with_code_2_and_one_line_and_no_folder(tmp_path, arguments, expected):
    code, out, err = run(*TINY, *arguments, f"--workdir={tmp_path}/run")
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert out == "" and not (tmp_path / "run").exists()
