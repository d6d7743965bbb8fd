import numpy as np
import pytest

from mae_jax.workdir.reporting import draw, make_panels

TRAINED = {"step": 50, "train/loss": 0.9, "train/learning_rate": 1e-3, "images_per_second": 9.0}


@pytest.mark.parametrize(
    "evaluated, panels",
    [
        ({}, {"loss": ["training"], "learning rate": ["learning rate"]}),
        ({"eval/loss": 0.8}, {"loss": ["training", "evaluation"], "learning rate": ["learning rate"]}),
        (
            {"eval/loss": 0.8, "eval/rankme": 7.5, "eval/linear_probe/top1": 0.5, "eval/knn/top1": 0.25},
            {
                "loss": ["training", "evaluation"],
                "learning rate": ["learning rate"],
                "accuracy on evaluation images, %": ["linear probe", "k-NN"],
            },
        ),
        (
            {"eval/top1": 0.5, "eval/top5": 0.75},
            {
                "loss": ["training"],
                "learning rate": ["learning rate"],
                "accuracy on evaluation images, %": ["top-1", "top-5"],
            },
        ),
    ],
)
def test_the_panels_are_those_of_which_the_metrics_have_something(evaluated, panels):
    found = make_panels([TRAINED, {"step": 50} | evaluated])
    assert {title: list(curves) for title, curves in found.items()} == panels


def test_without_metrics_and_of_values_that_are_no_numbers_there_is_nothing_to_draw():
    values = ("x", None, [1.0], float("inf"), 10**400)
    assert make_panels([]) == make_panels({"step": 1, "train/loss": value} for value in values) == {}


@pytest.mark.parametrize("losses", [[3.0], [0.5, 0.5], [-1.0, 2.0], [0.0, 0.0, 0.0], list(np.geomspace(9, 0.3, 2000))])
@pytest.mark.filterwarnings("error")
def test_any_curve_is_drawn_in_1200_x_400_pixels(losses):
    lines = [{"step": step, "train/loss": float(loss), "train/learning_rate": 0.0} for step, loss in enumerate(losses)]
    picture = draw(make_panels([*lines, {"step": len(losses), "eval/loss": 0.5, "eval/knn/top1": 0.5}]))
    assert picture.shape == (400, 1200, 3) and picture.dtype == np.uint8 and len(np.unique(picture)) > 50


def test_the_first_steps_of_a_loss_do_not_flatten_the_rest():
    def height(losses):
        lines = [{"step": step, "train/loss": float(loss)} for step, loss in enumerate(losses)]
        picture = draw(make_panels(lines))
        blue = (picture[..., 2] > 150) & (picture[..., 0] < 80)  # the curve's colour
        return np.ptp(np.flatnonzero(blue[:, 600:].any(axis=1)))

    falling = np.linspace(1.0, 0.5, 100)
    assert height([1000.0, *falling]) > 0.8 * height(falling) > 50
