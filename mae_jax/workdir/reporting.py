"""What a run tells: lines or a progress bar, metrics.jsonl and .png, TensorBoard, pictures, config.json, result."""

import contextlib
import functools
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import reason
from mae_jax.runtime.processes import from_main, is_main
from mae_jax.workdir.appending import Appender, make_summary_writer
from mae_jax.workdir.curves import Curves, draw
from mae_jax.workdir.history import cut_metrics, read_metrics
from mae_jax.workdir.writing import make_temporary, write_json

WATCHED = ("knn/top1", "linear_probe/top1", "rankme", "top1")  # of the last evaluation, shown beside the progress
LONG = 12 * 3600  # seconds on a CPU from which a run is told that there is a smaller model
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy", "pillow")


class Reporter:
    """Writes everything about a run's progress into its workdir and onto the console.

    Of several processes only the first one writes; the others have a reporter without files.

    Lines of metrics.jsonl that lie after `start_step` are of a run that was killed; they are dropped, since the steps
    are made again. Numbers that are not finite are left out. A disk that is full does not stop the run.

    Args:
      flops_per_image: step, from 0 -> operations of one of its images, forward and backward.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        batch_size: int,
        flops_per_image: Callable[[int], float],
        unwritten_config: dict[str, Any] | None = None,
    ):
        self._total_steps, self._batch_size, self._flops = total_steps, batch_size, flops_per_image
        self._workdir, self._unwritten_config = Path(workdir), unwritten_config
        path = self._workdir / "metrics.jsonl"
        cut_metrics(path, start_step)
        lines = read_metrics(path) if is_main() else []
        self._curves = Curves(lines)
        evaluated = {line["step"] for line in lines if any(name.startswith("eval/") for name in line)}
        self._evaluated = set(from_main(sorted(evaluated)))
        self._metrics = Appender(path if is_main() else Path(os.devnull))
        self._start_step = start_step
        self._watched = ""
        self._length_told = False
        self._bar = None
        if sys.stderr.isatty() and is_main():
            layout = "{l_bar}{bar}| step {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=total_steps, initial=start_step, bar_format=layout, dynamic_ncols=True)

    def line(self, *lines: str) -> None:
        """Prints lines (above the progress bar, if there is one)."""
        say(*lines)

    def training(self, step: int, scalars: dict[str, float], *, seconds: float, steps: int, waited: float) -> None:
        """Reports the scalars of a step, and the speed of the last `steps` steps.

        Args:
          seconds: wall time of these steps, without evaluations and saving.
          waited: seconds of it in which the loop waited for data.
        """
        images_per_second = steps * self._batch_size / seconds
        flops_per_image = sum(self._flops(earlier) for earlier in range(step - steps, step)) / steps
        speed = {
            "images_per_second": images_per_second,
            "data_wait_fraction": waited / seconds,
            "tflops_per_second": images_per_second * flops_per_image / 1e12,
        }
        self._write(step, {f"train/{name}": value for name, value in scalars.items()} | speed)
        seconds_left = (self._total_steps - step) * seconds / steps
        left = f"{tqdm.format_interval(seconds_left)} left"
        parts = [f"loss {scalars['loss']:.4f}", f"{images_per_second:,.0f} images/s", left]
        parts += [self._watched] if self._watched else []
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
        else:
            self.line("  ".join((f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}", *parts)))
        if step > self._start_step + 1 and not self._length_told:  # the first step alone is slower than the others
            self._length_told = True
            if seconds_left > LONG and jax.default_backend() == "cpu":
                hours = f"{seconds_left / 3600:,.0f} hours"
                self.line(
                    f"this run takes {hours} more on a CPU: configs/small_photos.py has a model and pictures of a size "
                    "for one; fewer train.epochs shorten any run"
                )

    def scalars(self, step: int, scalars: dict[str, float], prefix: str = "") -> None:
        """Reports further scalars of a step, each under prefix + its name; scores stay in the progress line.

        Those of an evaluation draw the curves anew.
        """
        found = (f"{name} {scalars[name]:.4g}" for name in WATCHED if name in scalars)
        self._watched = "  ".join(found) or self._watched
        scalars = {prefix + name: float(value) for name, value in scalars.items()}
        self._write(step, scalars)
        self.line(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in scalars.items()))
        if prefix == "eval/":
            self.draw_curves()

    def draw_curves(self) -> None:
        """Draws metrics.png from all metrics, those of the time before the run was resumed too."""
        if is_main() and (panels := self._curves.panels()):
            self._save_if_possible(self._workdir / "metrics.png", lambda: draw(panels))

    def saved(self, step: int, seconds: float) -> None:
        """Reports for how long the run stood still to save a step."""
        self._write(step, {"save_seconds": seconds})

    def picture(self, step: int, folder: str, picture: np.ndarray) -> Path:
        """Writes a picture [H, W, 3] uint8 to folder/<step>.png and to TensorBoard; returns its path."""
        path = self._workdir / folder / f"{step}.png"
        self._save_if_possible(path, lambda: picture)
        self._tensorboard.add_image(folder, picture, step, dataformats="HWC")
        return path

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation of this step was reported before the run was resumed."""
        return step in self._evaluated

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._bar is not None:
            self._bar.close()
        self._metrics.close()
        if "_tensorboard" in vars(self):
            self._tensorboard.close()

    @functools.cached_property
    def _tensorboard(self):
        # Not before there is something to write: the first step need not wait for tensorboardX, which imports PyTorch
        # where that is installed.
        return make_summary_writer(self._workdir, purge_step=self._start_step + 1)

    def _save_if_possible(self, path: Path, make: Callable[[], np.ndarray]) -> None:
        try:
            save_picture(path, make())
        except OSError as error:
            say(f"{path} cannot be written: {reason(error)}; the run goes on without it")

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        if self._unwritten_config:
            with contextlib.suppress(OSError):
                write_json(self._workdir / "config.json", self._unwritten_config)
                self._unwritten_config = None
        scalars = {name: value for name, value in scalars.items() if math.isfinite(value)}  # JSON has no others
        self._curves.add({"step": step} | scalars)
        self._metrics.append((json.dumps({"step": step} | scalars, allow_nan=False) + "\n").encode())
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)


def write_if_possible(path: Path, value: dict[str, Any]) -> bool:
    """As `write_json`, but if it cannot be written tells so and returns False."""
    try:
        write_json(path, value)
    except OSError as error:
        say(f"{path} cannot be written: {reason(error)}; the run goes on and writes it when it can")
        return False
    return True


def save_picture(path: Path, picture: np.ndarray) -> Path:
    """Writes a picture [H, W, 3] uint8 as PNG, whole or not at all; returns its path."""
    from PIL import Image

    if not is_main():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary(path)
    try:
        Image.fromarray(picture).save(temporary, format="PNG")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def provenance() -> dict[str, Any]:
    """Versions of the packages that decide a run's numbers, and this project's git commit if it is a git checkout."""
    root = Path(__file__).parent.parent.parent
    try:
        git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        commit = None
    return {
        "versions": {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": commit,
    }
