"""The tasks that probe a frozen encoder with few labels, or with many heads at once."""

import csv

import pytest

from tests.runs import mistake, read_json, run_task
from tests.tasks.test_meshes import run_on

pytestmark = pytest.mark.slow
QUICK = dict(evaluate__probe_sweep_epochs=4.0, evaluate__probe_sweep_rates=(0.01, 0.1))


@pytest.fixture(scope="module")
def swept(pretrained, tmp_path_factory):
    """The workdir of a sweep on eight devices, which share the rows, the parameters and the heads."""
    workdir = tmp_path_factory.mktemp("runs") / "swept"
    return run_on((2, 2, 2), "probe_sweep", workdir, init_from=str(pretrained), **QUICK)


def test_a_sweep_writes_a_row_for_every_head_and_its_best_beside_the_random_encoders(swept):
    result, rows = read_json(swept / "result.json"), list(csv.DictReader((swept / "sweep.csv").open()))
    assert len(rows) == len(result["sweep"]) == 2 * 3 * 2 and rows[0].keys() == result["sweep"][0].keys()
    assert {row["layers"] for row in rows} == {"2", "1+2"} and {row["token"] for row in rows} == {
        "class", "mean", "class+mean",
    }  # fmt: skip
    best = {name.removeprefix("probe_sweep/"): x for name, x in result.items() if name.startswith("probe_sweep/")}
    assert best == result["sweep"][0] and best["held_out_top1"] == max(float(row["held_out_top1"]) for row in rows)
    assert result["probe_sweep/top1"] > 0.5 and 0 < result["random_encoder/probe_sweep/top1"] < 1
    assert "10% of each class's training images, on which it has not learned" in result["protocol"]


def test_one_device_finds_what_eight_do(swept, pretrained, tmp_path, capsys):
    run_on(None, "probe_sweep", tmp_path, init_from=str(pretrained), evaluate__random_encoder=False, **QUICK)
    ours, theirs = read_json(tmp_path / "result.json"), read_json(swept / "result.json")
    for name in ("top1", "held_out_top1"):
        assert ours[f"probe_sweep/{name}"] == pytest.approx(theirs[f"probe_sweep/{name}"], abs=1.5 / 143)
    out = capsys.readouterr().out
    assert "trains 12 heads, 0.4 MiB of features" in out and "the first is chosen, on the held-out" in out


def test_few_shots_are_told_for_each_number_and_as_an_evaluator_of_evaluate_too(pretrained, tmp_path, capsys):
    settings = dict(init_from=str(pretrained), evaluate__shot_draws=2)
    result = read_json(run_task("few_shot", tmp_path / "task", **settings) / "result.json")
    assert 0.2 < result["5_shot/top1"] < result["10_shot/top1"] < 1 and len(result["sweep"]) == 2 * 8
    assert {"5_shot/top1_std", "random_encoder/10_shot/top1"} < result.keys()
    assert f"{result['5_shot/top1']:.2%} ± {result['5_shot/top1_std']:.2%}" in capsys.readouterr().out
    names = dict(evaluate__evaluators=("few_shot",), evaluate__shots=(5,))
    evaluated = read_json(run_task("evaluate", tmp_path / "evaluate", **settings, **names) / "result.json")
    assert evaluated["eval/5_shot/top1"] == result["5_shot/top1"] and "eval/10_shot/top1" not in evaluated


@pytest.mark.parametrize(
    "task, settings, expected",
    [
        ("few_shot", dict(data__name="tests.label_sources:Several"), "takes labels of the kind class, not multi"),
        ("probe_sweep", dict(data__name="tests.label_sources:Numbers"), "takes labels of the kind class, not number"),
        ("probe_sweep", dict(evaluate__layers=((3,),)), "evaluate.layers: layer 3: the encoder has the blocks 1 to 2"),
        ("probe_sweep", dict(evaluate__layers=(1, 2)), "evaluate.layers=(1, 2) must be groups of blocks"),
        ("few_shot", dict(evaluate__shots=(2.5,)), "evaluate.shots=(2.5,) must be whole numbers"),
        ("probe_sweep", dict(evaluate__knn_k=3, given=("evaluate.knn_k",)), "is not for the task probe_sweep"),
    ],
)
def test_what_cannot_be_probed_is_refused_in_one_line(task, settings, expected, pretrained, tmp_path):
    assert expected in mistake(task, tmp_path / "run", init_from=str(pretrained), **settings)
