"""Metric writers: the destinations of a run's numbers and pictures, named by `logging.writers`."""

import contextlib
import functools
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.runtime.processes import is_main
from mae_jax.settings.fields import flatten
from mae_jax.settings.registry import Registry
from mae_jax.workdir.writing import parse_object, write_atomically

METRICS = "metrics.jsonl"


class MetricWriter(Protocol):
    """Takes numbers and pictures, in process 0 only. A class attribute `package` names a package that it needs."""

    def __init__(self, workdir: Path, config: dict[str, Any], start_step: int | None):
        """`start_step`: that of the checkpoint of a resumed run; 0: a new run; None: a task that only measures."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Takes finite numbers by name."""

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Takes a picture [H, W, 3] uint8."""

    def close(self) -> None:
        """Flushes and closes."""


WRITERS: Registry[type[MetricWriter]] = Registry("logging.writers")


def check_writers(names: Iterable[str]) -> None:
    """Raises UserError for an unknown writer, or one whose package is not installed."""
    for name in names:
        package = getattr(WRITERS.find(name), "package", None)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"logging.writers={name} needs a package: pip install {package}, or leave {name} out")


class Writers:
    """All writers of a run, always including metrics.jsonl; none in processes other than 0."""

    def __init__(self, workdir: Path, config: dict[str, Any], start_step: int | None):
        names = dict.fromkeys(("jsonl", *config["logging"]["writers"])) if is_main() else ()
        self._writers = [WRITERS.find(name)(workdir, config, start_step) for name in names]

    def scalars(self, step: int, values: dict[str, float]) -> None:
        values = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for writer in self._writers:
            writer.scalars(step, values)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        for writer in self._writers:
            writer.picture(step, name, picture)

    def close(self) -> None:
        for writer in self._writers:
            with contextlib.suppress(OSError):  # writing the data raised it already
                writer.close()


def write_once(workdir: Path, config: dict[str, Any], step: int, result: dict[str, Any]) -> None:
    """Writes the numbers in the result of a measuring task."""
    numbers = {name: value for name, value in result.items() if type(value) in (int, float) and name != "step"}
    with contextlib.closing(Writers(workdir, config, None)) as writers:
        writers.scalars(step, numbers)


@WRITERS.register("jsonl")
class JsonLines(MetricWriter):
    """metrics.jsonl: an object a line, flushed at once. A resumed run keeps the lines up to its checkpoint."""

    def __init__(self, workdir: Path, config: dict[str, Any], start_step: int | None):
        if start_step is not None:
            cut_metrics(workdir / METRICS, start_step)
        self._file = open(workdir / METRICS, "ab", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step} | values, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The intact lines of a metrics.jsonl; empty if there is no file."""
    return [line for line in map(_parse, path.read_bytes().splitlines()) if line] if path.is_file() else []


def _parse(text: bytes) -> dict[str, Any] | None:
    line = parse_object(text) or {}
    return line if type(line.get("step")) is int else None


def cut_metrics(path: Path, step: int) -> None:
    """Removes damaged lines from a metrics.jsonl, and those after `step`, which the run repeats."""
    if path.is_file():
        before = path.read_bytes()
        lines, count = [_parse(text) for text in before.splitlines()], before.count(b"\n")
        if damaged := lines[:count].count(None):  # the last one may be incomplete
            say(f"{path}: {damaged} of {count} lines are damaged and left out")
        after = "".join(json.dumps(line) + "\n" for line in lines if line and line["step"] <= step)
        if after.encode() != before:
            write_atomically(path, after)


@WRITERS.register("tensorboard")
class TensorBoard:
    """An event file, written in the caller's thread: a full disk then ends the run instead of hanging it."""

    package = "tensorboardX"

    def __init__(self, workdir: Path, config: dict[str, Any], start_step: int | None):
        self._workdir, self._config, self._start_step = workdir, config, start_step

    @functools.cached_property
    def _file(self):
        # Opened late, so the first step does not wait: tensorboardX imports PyTorch if that is installed.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import text

        file = EventsWriter(str(self._workdir / "events"), filename_suffix=f".{time.time_ns()}")
        if self._start_step is not None:  # TensorBoard hides earlier events from this step on
            start = SessionLog(status=SessionLog.START)
            file.write_event(Event(step=self._start_step + 1, session_log=start))
        config = json.dumps(self._config, indent=2, default=str)
        file.write_event(Event(wall_time=time.time(), summary=text("config", f"```\n{config}\n```")))
        return file

    def _write(self, step: int, kind: str, values: dict[str, Any], **options) -> None:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        for name, value in values.items():
            found = getattr(summary, kind)(name, value, **options)
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=found))
        self._file.flush()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._write(step, "scalar", values)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._write(step, "image", {name: picture}, dataformats="HWC")

    def close(self) -> None:
        if "_file" in vars(self):
            self._file.close()


def _kept_id(path: Path, start_step: int | None) -> str | None:
    """A tracker's id of the resumed run; None for a new one."""
    return path.read_text().strip() if start_step and path.is_file() else None


@WRITERS.register("wandb")
class WeightsAndBiases:
    """A run in the project named after the workdir's parent folder; W&B's environment variables apply."""

    package = "wandb"

    def __init__(self, workdir: Path, config: dict[str, Any], start_step: int | None):
        import wandb

        self._image, workdir = wandb.Image, workdir.resolve()
        id_file = workdir / "wandb_run.txt"
        try:
            self._run = wandb.init(
                project=workdir.parent.name or None, name=workdir.name, config=config,
                id=_kept_id(id_file, start_step), resume="allow",
                dir=os.environ.get("WANDB_DIR", workdir), settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise UserError(
                f"logging.writers=wandb cannot start: {first_line(error)}; log in, or set WANDB_MODE=offline"
            ) from error
        write_atomically(id_file, self._run.id + "\n")
        self._run.define_metric("*", step_metric="step")  # a resumed run repeats some steps

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step} | values)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._run.log({"step": step, name: self._image(picture)})

    def close(self) -> None:
        self._run.finish()


@WRITERS.register("mlflow")
class MLflow:
    """A run in the experiment named after the workdir's parent, at MLFLOW_TRACKING_URI or in the workdir."""

    package = "mlflow"

    def __init__(self, workdir: Path, config: dict[str, Any], start_step: int | None):
        import mlflow

        self._mlflow, workdir = mlflow, workdir.resolve()
        id_file, uri = workdir / "mlflow_run.txt", os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 requires it for plain files
            uri = (workdir / "mlruns").as_uri()
        try:
            mlflow.set_tracking_uri(uri)
            mlflow.set_experiment(workdir.parent.name or "mae_jax")
            run = mlflow.start_run(_kept_id(id_file, start_step), run_name=workdir.name)
            write_atomically(id_file, run.info.run_id + "\n")
            if not start_step:  # they cannot be changed later
                mlflow.log_params(flatten(config))
            mlflow.log_dict(config, "config.json")
        except mlflow.MlflowException as error:
            raise UserError(f"logging.writers=mlflow cannot start at {uri}: {first_line(error)}") from error

    def _send(self, send: Callable, *values, **named) -> None:
        try:
            send(*values, **named)
        except self._mlflow.MlflowException as error:
            say(f"MLflow could not log: {first_line(error)}; the run goes on")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._send(self._mlflow.log_metrics, values, step=step)

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        self._send(self._mlflow.log_image, picture, key=name, step=step)

    def close(self) -> None:
        self._send(self._mlflow.end_run)
