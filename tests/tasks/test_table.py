"""The table: means and deviations against NumPy, and what a person and a program read."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import train_flops
from mae_jax.tasks.ablation.jobs import Outcome, read_outcome
from mae_jax.tasks.ablation.report import draw_csv, draw_markdown, make_rows, mean_train_flops, show, summarize_values
from tests.tasks.test_grid import FINETUNE, make_config, plan_of

SCORES = ("finetune/top1", "eval/loss")
TOP1 = {("0.5", 0): 0.9, ("0.5", 1): 0.92, ("0.75", 0): 0.97, ("0.75", 1): 0.95}


@pytest.fixture
def plan():
    return plan_of(grid=(("model.mask_ratio", (0.5, 0.75)),), measure=(FINETUNE,), seeds=(0, 1), scores=SCORES)


def outcome(run):
    if run.name == "pretrain":
        return Outcome({"eval/loss": 0.3 + run.seed / 10}, 60.0, None)
    return Outcome({"finetune/top1": TOP1[run.cell.split()[-1], run.seed]}, 30.0 + 60 * run.seed, None)


def test_mean_and_deviation_are_those_of_the_sample():
    values = [0.9, 0.92, 0.97]
    found = summarize_values(values)
    assert found["mean"] == pytest.approx(np.mean(values)) and found["std"] == pytest.approx(np.std(values, ddof=1))
    assert summarize_values([0.5]) == {"mean": 0.5, "std": None, "values": [0.5]}
    assert summarize_values([]) == {"mean": None, "std": None, "values": []}


def test_a_row_has_its_scores_of_all_seeds_its_minutes_and_its_operations(plan):
    row = make_rows(plan, SCORES, outcome)[0]
    assert row["scores"]["finetune/top1"]["values"] == [0.9, 0.92]
    assert row["minutes"] == pytest.approx((1.5 + 2.5) / 2) and row["failed"] == {} and row["missing"] == 0
    model = MAEConfig(**plan.runs[0].config.model)
    assert model.mask_ratio == 0.5 and row["train_gflop_per_image"] == train_flops(model) / 1e9


def test_people_read_shares_in_per_cent_with_one_decimal_and_losses_with_four_digits():
    assert show("finetune/top1", summarize_values([0.9, 0.92])) == "91.0 ± 1.4"
    assert show("eval/loss", summarize_values([0.30321])) == "0.3032"
    assert show("eval/loss", summarize_values([])) == "–"


def test_the_markdown_has_a_line_for_each_cell_and_marks_what_failed(plan):
    def partly(run):
        failed = run.cell == "mask_ratio 0.75" and run.seed == 1
        return Outcome(None, 3.0, "killed by signal 9 (out of memory?)") if failed else outcome(run)

    lines = draw_markdown(make_rows(plan, SCORES, partly), plan.axes, SCORES).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "mask_ratio", "GFLOP an image", "finetune/top1 %", "eval/loss", "minutes",
    ]  # fmt: skip
    assert len({len(line) for line in lines[:4]}) == 1, "the columns stand below one another"
    assert [cell[-2:] for cell in lines[1].strip("| ").split(" | ")] == ["--", "-:", "-:", "-:", "-:"], "numbers: right"
    assert "91.0 ± 1.4" in lines[2] and "0.3500 ± 0.0707" in lines[2]
    assert lines[3].startswith("| 0.75 (failed) ") and " 97.0 " in lines[3], "the seed that is there counts"
    assert lines[-1] == "- mask_ratio 0.75, seed 1: pretrain: killed by signal 9 (out of memory?)"


def test_the_csv_has_full_precision_and_the_number_of_seeds(plan):
    rows = make_rows(plan, SCORES, outcome)
    first, second = csv.DictReader(io.StringIO(draw_csv(rows, plan.axes, SCORES)))
    assert float(first["finetune/top1 std"]) == np.std([0.9, 0.92], ddof=1) and first["finetune/top1 n"] == "2"
    assert float(second["finetune/top1 mean"]) == np.mean([0.97, 0.95]) and second["mask_ratio"] == "0.75"
    assert second["cell"] == "mask_ratio 0.75" and second["failed"] == ""


def test_what_is_not_there_yet_is_missing_and_not_failed(plan):
    row = make_rows(plan, SCORES, lambda run: Outcome(None, None, None))[0]
    assert row["missing"] == 4 and row["failed"] == {} and row["minutes"] is None
    assert "| 0.5 (missing) |" in draw_markdown([row], plan.axes, SCORES)


def test_a_folder_of_a_run_that_never_began_says_nothing(plan):
    assert not Path("/nowhere").exists()
    assert read_outcome(plan.runs[0]) == Outcome(None, None, None)


def test_images_that_grow_count_by_their_share_of_the_run():
    model = make_config().model.to_dict()
    small, whole = (train_flops(MAEConfig(**model | {"image_size": size})) for size in (4, 8))
    config = make_config()
    config.train.resolutions = ((0.25, 4),)
    assert mean_train_flops(config) == pytest.approx(0.25 * small + 0.75 * whole)
