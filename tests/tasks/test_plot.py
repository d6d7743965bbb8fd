"""The picture of an ablation: which points, on which scale, with which numbers beneath."""

from pathlib import Path

import numpy as np
import pytest

from mae_jax.runtime.errors import UserError
from mae_jax.tasks.ablation.jobs import Outcome, make_plan
from mae_jax.tasks.ablation.report import draw, make_panels, make_rows
from tests.tasks.test_grid import make_config, plan_of

SCORES = ("linear_probe/top1", "eval/loss")


def panels_of(grid, seeds=(0, 1), absent=()):
    plan = plan_of(grid=grid, seeds=seeds, scores=SCORES)

    def outcome(run):
        if run.cell in absent:
            return Outcome(None, 1.0, "it failed")
        return Outcome({"linear_probe/top1": 0.9 + run.seed / 100, "eval/loss": 0.3}, 1.0, None)

    return make_panels(plan, make_rows(plan, SCORES, outcome), SCORES)


def test_a_panel_has_the_mean_in_per_cent_and_the_deviation():
    panel, loss = panels_of((("model.mask_ratio", (0.75, 0.5)),))
    assert panel.xs == [0.5, 0.75], "in the order of the axis"
    assert panel.ys == pytest.approx([90.5, 90.5])
    assert panel.errors == pytest.approx([100 * np.std([0.9, 0.91], ddof=1)] * 2) and loss.ys == [0.3, 0.3]
    assert panels_of((("model.mask_ratio", (0.5,)),), seeds=(0,))[0].errors is None


def test_cells_that_differ_in_one_number_are_a_curve_and_others_have_their_names():
    assert panels_of((("train.epochs", (1, 2.5)),))[0].xs == [1, 2.5]
    assert panels_of((("model.remat", (True, False)),))[0].xs == ["remat True", "remat False"]
    both = panels_of((("train.epochs", (1,)), ("model.depth", (1, 2))))[0]
    assert both.xs == ["epochs 1, depth 1", "epochs 1, depth 2"]


def test_cells_that_failed_are_absent_and_named_rows_keep_their_names():
    (panel, _) = panels_of((("data.crop_rule", ("retry", "centre")),), absent=("crop_rule retry",))
    assert panel.xs == ["crop_rule centre"]
    assert panels_of((("data.crop_rule", ("retry",)),), absent=("crop_rule retry",)) == []


@pytest.mark.parametrize(
    "grid, paper",
    [
        ((("model.mask_ratio", (0.5, 0.75)),), (("linear probing", ((0.1, 54.6), (0.75, 73.5))),)),
        ((("data.crop_rule", ("retry", "centre")),), (("linear probing", (("none", 65.7), ("crop", 73.5))),)),
    ],
)
def test_ours_stands_at_the_left_and_the_papers_at_the_right_with_its_own_axis(grid, paper):
    ours = panels_of(grid)
    both, alone = draw(ours, paper, "x", "title", "source"), draw(ours, (), "x", "title", "source")
    assert both.dtype == np.uint8 and both.shape[1] == 2 * alone.shape[1] and both.shape[0] == alone.shape[0]
    middle = both.shape[1] // 2

    def is_ours(picture):
        return np.any(np.all(picture == (31, 119, 180), axis=-1))  # the blue of our points

    assert is_ours(alone) and is_ours(both[:, :middle]) and not is_ours(both[:, middle:])


@pytest.mark.parametrize("paper", [("x",), (("x", ()),), (("x", ((1, "high"),)),)])
def test_a_curve_that_is_none_is_refused_before_anything_is_trained(paper):
    with pytest.raises(UserError, match="ablate.paper has .*, which is no curve"):
        make_plan(make_config(grid=(("model.mask_ratio", (0.5,)),), paper=paper), Path("/nowhere"))
