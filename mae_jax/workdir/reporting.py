"""Reports of a run's progress to the console and the metric writers, and the versions behind its numbers."""

import contextlib
import importlib.metadata
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mae_jax.runtime.console import say
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.workdir.metrics import METRICS, Writers, read_metrics
from mae_jax.workdir.writing import save_picture

# Of the last evaluation, shown in the progress line.
WATCHED = ("knn/top1", "linear_probe/top1", "knn/mAP", "knn/r2", "rankme", "top1", "mAP", "r2")
LONG = 12 * 3600  # seconds left on a CPU from which a line suggests the config for small models
# Panels from left to right: title, and name in metrics.jsonl -> name in the legend.
PANELS = {
    "loss": {"train/loss": "training", "eval/loss": "evaluation"},
    "learning rate": {"train/learning_rate": "learning rate"},
    "accuracy on evaluation images, %": {
        "eval/top1": "top-1", "eval/top5": "top-5", "eval/linear_probe/top1": "linear probe", "eval/knn/top1": "k-NN",
        "eval/balanced_accuracy": "balanced",
    },
    "mAP and F1 on evaluation images, %": {
        "eval/mAP": "mAP", "eval/micro_f1": "micro F1", "eval/macro_f1": "macro F1",
        "eval/linear_probe/mAP": "mAP, linear probe", "eval/knn/mAP": "mAP, k-NN",
    },
    "R2 on evaluation images": {
        "eval/r2": "R2", "eval/linear_probe/r2": "linear probe", "eval/knn/r2": "k-NN",
    },
}  # fmt: skip
EARLY = 0.1  # share of the steps whose losses the axis ignores: they are high and would flatten the rest
Curves = dict[str, list[tuple[int, float]]]  # name in the legend -> (step, value)
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "pillow",
            "simplejpeg", "kornia-rs")  # fmt: skip


class Reporter:
    """Reports a run in process 0: on the console, to the metric writers, as metrics.png and picture files."""

    line = staticmethod(say)

    def __init__(
        self, workdir: Path, writers: Writers, *, start_step: int, total_steps: int, batch_size: int,
        flops_per_image: Callable[[int], float],  # by step, from 0: forward and backward
    ):  # fmt: skip
        self._workdir, self._writers = Path(workdir), writers
        self._total_steps, self._batch_size, self._flops = total_steps, batch_size, flops_per_image
        lines = read_metrics(self._workdir / METRICS)
        evaluated = {line["step"] for line in lines if any(name.startswith("eval/") for name in line)}
        self._evaluated = from_main(sorted(evaluated))
        self._watched, self._bar = [], None
        self._start_step, self._length_told = start_step, False
        if sys.stderr.isatty() and is_main():
            layout = "{l_bar}{bar}| step {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=total_steps, initial=start_step, bar_format=layout, dynamic_ncols=True)

    def training(self, step: int, scalars: dict[str, float], *, seconds: float, steps: int, waited: float) -> None:
        """Reports a step's scalars, and the speed of `steps` steps that took `seconds`, of which data took `waited`."""
        images_per_second = steps * self._batch_size / seconds
        flops_per_image = sum(self._flops(earlier) for earlier in range(step - steps, step)) / steps
        values = {f"train/{name}": value for name, value in scalars.items()}
        values |= {"images_per_second": images_per_second, "data_wait_fraction": waited / seconds}
        values["tflops_per_second"] = images_per_second * flops_per_image / 1e12
        self._writers.scalars(step, values)
        seconds_left = (self._total_steps - step) * seconds / steps
        parts = [f"loss {scalars['loss']:.4f}", f"{images_per_second:,.0f} images/s"]
        parts += [f"{tqdm.format_interval(seconds_left)} left", *self._watched]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            say("  ".join((f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}", *parts)))
        if step > self._start_step + 1 and not self._length_told:  # the first step alone is slower
            self._length_told = True
            if seconds_left > LONG and jax.default_backend() == "cpu":
                hours = f"this run will take {seconds_left / 3600:,.0f} more hours on a CPU"
                say(f"{hours}: configs/small_photos.py has sizes that suit one, and fewer train.epochs shorten any run")

    def scalars(self, step: int, scalars: dict[str, float], prefix: str = "") -> None:
        """Reports further scalars as prefix + name; scores stay in the progress line, evaluations redraw curves."""
        self._watched = [f"{name} {scalars[name]:.4g}" for name in WATCHED if name in scalars] or self._watched
        scalars = {prefix + name: float(value) for name, value in scalars.items()}
        self._writers.scalars(step, scalars)
        say(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
        if prefix == "eval/":
            self.draw_curves()

    def draw_curves(self) -> None:
        """Draws metrics.png from all metrics, including those from before a resume."""
        if is_main() and (panels := make_panels(read_metrics(self._workdir / METRICS))):
            save_picture(self._workdir / "metrics.png", draw(panels))

    def saved(self, step: int, seconds: float) -> None:
        """Reports how long the loop waited for the save of a step."""
        self._writers.scalars(step, {"save_seconds": seconds})

    def picture(self, step: int, folder: str, picture: np.ndarray) -> Path:
        """Writes a picture [H, W, 3] uint8 to folder/<step>.png and to the writers; returns its path."""
        self._writers.picture(step, folder, picture)
        return save_picture(self._workdir / folder / f"{step}.png", picture)

    def has_evaluation(self, step: int) -> bool:
        """Whether the run reported the evaluation of this step before it was resumed."""
        return step in self._evaluated

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._writers.close()


def provenance() -> dict[str, Any]:
    """Versions of the packages that determine a run's numbers, and this project's git commit, if known."""
    commit, versions = None, {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the last two may be missing
            versions[name] = importlib.metadata.version(name)
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"versions": {"python": sys.version.split()[0]} | versions, "git_commit": commit}


def make_panels(lines: Iterable[dict[str, Any]]) -> dict[str, Curves]:
    """Title -> curves in one panel, without empty panels and curves."""
    panels: dict[str, Curves] = {}
    for line in lines:
        for title, names in PANELS.items():
            for name, label in names.items():
                value = line.get(name)
                if isinstance(value, float) and math.isfinite(value):
                    point = line["step"], 100 * value if "%" in title else value
                    panels.setdefault(title, {}).setdefault(label, []).append(point)
    return panels


def draw(panels: dict[str, Curves]) -> np.ndarray:
    """A picture uint8 [400, 1200, 3]: the panels in a row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: matplotlib takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    row = figure.subplots(1, len(panels), squeeze=False, sharex=True)[0]
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for label, points in curves.items():
            marker = "o" if len(points) <= 30 else None
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, marker=marker, markersize=3)
        axes.set(title=title, xlabel="step")
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.3)
        if title == "loss":
            points = [point for points in curves.values() for point in points]
            begin = EARLY * max(step for step, _ in points)
            losses = [loss for step, loss in points if step >= begin]
            margin = 0.05 * (max(losses) - min(losses) or abs(max(losses)) or 1)
            axes.set_ylim(min(losses) - margin, max(losses) + margin)
        if list(curves) != [title]:
            axes.legend()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
