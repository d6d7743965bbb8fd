import json

import numpy as np
import pytest
from PIL import Image

from mae_jax.workdir import reporting
from mae_jax.workdir.folder import keep_earlier_result
from mae_jax.workdir.metrics import Writers
from mae_jax.workdir.reporting import Reporter, provenance
from mae_jax.workdir.writing import write_json

CONFIG = {"logging": {"writers": ()}}


@pytest.fixture
def open_reporter(tmp_path):
    """Returns a function: step that the run starts from -> Reporter in the test's folder (10 steps of 32 images)."""
    opened = []

    def open_(start_step=0, flops_per_image=lambda _: 5e9):
        writers = Writers(tmp_path, CONFIG, start_step)
        speed = dict(total_steps=10, batch_size=32, flops_per_image=flops_per_image)
        opened.append(Reporter(tmp_path, writers, start_step=start_step, **speed))
        return opened[-1]

    yield open_
    for reporter in opened:
        reporter.close()


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_on_disk_at_once_with_its_step_and_names(open_reporter, tmp_path):
    reporter = open_reporter()
    scalars = {"loss": 0.5, "grad_norm": 2.0, "learning_rate": 1e-3}
    reporter.training(4, scalars, seconds=2.0, steps=4, waited=0.5)
    reporter.scalars(4, {"loss": np.float32(0.25)}, prefix="eval/")
    assert lines_of(tmp_path) == [
        {
            "step": 4, "train/loss": 0.5, "train/grad_norm": 2.0, "train/learning_rate": 1e-3,
            "images_per_second": 64.0,  # 4 steps of 32 images in 2 s
            "data_wait_fraction": 0.25, "tflops_per_second": 0.32,
        },
        {"step": 4, "eval/loss": 0.25},
    ]  # fmt: skip


def test_operations_are_counted_by_the_step_that_made_them(open_reporter, tmp_path):
    # Five steps of 1e9 an image, the others of 4e9; the window has the last two of the five and two others.
    reporter = open_reporter(flops_per_image=lambda step: 1e9 if step < 5 else 4e9)
    reporter.training(7, {"loss": 0.5}, seconds=2.0, steps=4, waited=0.0)
    assert lines_of(tmp_path)[0]["tflops_per_second"] == pytest.approx(32 * (2 * 1e9 + 2 * 4e9) / 2 / 1e12)


def test_a_picture_is_a_file_of_its_step_and_goes_to_the_writers(tmp_path):
    taken = []

    class Other:
        def picture(self, *what):
            taken.append(what)

    reporter = Reporter(tmp_path, Other(), start_step=0, total_steps=9, batch_size=1, flops_per_image=lambda _: 1.0)
    picture = np.zeros((4, 6, 3), np.uint8)
    assert reporter.picture(3, "reconstructions", picture) == tmp_path / "reconstructions" / "3.png"
    assert Image.open(tmp_path / "reconstructions" / "3.png").size == (6, 4)
    assert taken == [(3, "reconstructions", picture)]


def test_a_resumed_run_drops_the_lines_of_steps_that_are_made_again(open_reporter, tmp_path):
    first = open_reporter()
    for step in range(1, 8):
        first.scalars(step, {"loss": float(step)}, prefix="train/")
    first.close()
    second = open_reporter(start_step=5)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5]
    second.scalars(6, {"loss": 60.0}, prefix="train/")
    assert [line["train/loss"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5, 60]


def test_evaluations_that_were_reported_before_the_resume_are_known(open_reporter):
    first = open_reporter()
    first.scalars(2, {"loss": 1.0}, prefix="eval/")
    first.scalars(3, {"loss": 1.0}, prefix="train/")
    first.scalars(4, {"loss": 1.0}, prefix="eval/")
    first.close()
    second = open_reporter(start_step=3)
    assert [step for step in range(6) if second.has_evaluation(step)] == [2]


def test_lines_name_step_loss_and_the_time_left(open_reporter, capsys):
    open_reporter().training(4, {"loss": 0.123456}, seconds=60.0, steps=2, waited=0.0)
    out = capsys.readouterr().out
    assert "4/10" in out and "loss 0.1235" in out and "03:00 left" in out  # 6 steps of 30 s


@pytest.mark.parametrize("backend, hours, lines", [("cpu", 12.1, 1), ("cpu", 11.9, 0), ("gpu", 12.1, 0)])
def test_a_run_of_over_twelve_hours_on_a_cpu_names_the_small_config_once(
    open_reporter, capsys, monkeypatch, backend, hours, lines
):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    reporter = open_reporter()
    reporter.training(1, {"loss": 1.0}, seconds=1e6, steps=1, waited=0.0)  # the first step is slow everywhere
    assert "small_photos" not in capsys.readouterr().out
    for step in (3, 4):
        reporter.training(step, {"loss": 1.0}, seconds=hours * 3600 / (10 - step), steps=1, waited=0.0)
    out = capsys.readouterr().out
    assert out.count("this run will take 12 more hours on a CPU: configs/small_photos.py") == lines


def test_an_evaluation_draws_the_curves_of_the_time_before_a_resume_too(open_reporter, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reporting, "draw", lambda panels: drawn.append(panels) or np.zeros((2, 2, 3), np.uint8))
    first = open_reporter()
    for step in (1, 2, 3):
        first.training(step, {"loss": 1.0 / step, "learning_rate": 0.5}, seconds=1.0, steps=1, waited=0.0)
    assert not drawn and not (tmp_path / "metrics.png").exists()
    first.scalars(2, {"loss": 0.5, "knn/top1": 0.25}, prefix="eval/")
    first.close()
    open_reporter(start_step=2).scalars(4, {"loss": 0.4, "knn/top1": 0.75}, prefix="eval/")
    assert drawn[-1] == {
        "loss": {"training": [(1, 1.0), (2, 0.5)], "evaluation": [(2, 0.5), (4, 0.4)]},
        "learning rate": {"learning rate": [(1, 0.5), (2, 0.5)]},
        "accuracy on evaluation images, %": {"k-NN": [(2, 25.0), (4, 75.0)]},
    }
    assert Image.open(tmp_path / "metrics.png").size == (2, 2)


def test_only_the_first_process_draws_the_curves(open_reporter, tmp_path, monkeypatch):
    reporter = open_reporter()
    monkeypatch.setattr(reporting, "is_main", lambda: False)
    reporter.scalars(2, {"loss": 0.5}, prefix="eval/")
    assert not (tmp_path / "metrics.png").exists()


def test_the_result_of_a_run_that_is_made_longer_is_kept_under_another_name(tmp_path):
    write_json(tmp_path / "result.json", {"step": 10})
    keep_earlier_result(tmp_path, 10)
    assert not (tmp_path / "result.json").exists()
    assert json.loads((tmp_path / "result.10.json").read_text()) == {"step": 10}
    write_json(tmp_path / "result.json", {"step": 10, "again": True})
    keep_earlier_result(tmp_path, 10)
    assert json.loads((tmp_path / "result.10.json").read_text()) == {"step": 10}, "an older one stays"
    assert json.loads((tmp_path / "result.10.1.json").read_text()) == {"step": 10, "again": True}


def test_the_provenance_names_python_and_every_package_that_decides_numbers():
    versions = provenance()["versions"]
    assert versions["jax"].count(".") >= 2
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"} <= versions.keys()
