"""metrics.jsonl and the other writers: what they get, and what a run that goes on finds there."""

import importlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from configs.common import get_config
from mae_jax.runtime.errors import UserError
from mae_jax.workdir import metrics
from mae_jax.workdir.metrics import Writers, check_writers, cut_metrics, read_metrics, write_once

PICTURE = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)


def open_writers(workdir, *names, start_step=0):
    config = get_config()
    config.logging.writers = names
    return Writers(workdir, config.to_dict(), start_step)


def numbered(*steps):
    return "".join(f'{{"step": {step}}}\n' for step in steps)


DAMAGE = ["\0\0\0", '{"step": 2, "a"', "[1]", "null", '{"a": 1}', '{"step": "2"}', '{"step": null}', '{"step": true}',
          '{"step": [2]}', '{"step": 2.5}', "[" * 100_000, '{"step": ' + "9" * 5000 + "}", "\xff"]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_costs_that_line_alone_wherever_it_stands(tmp_path, damage, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{numbered(1)}{damage}\n{numbered(3, 4, 5)}", encoding="latin-1")
    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4, 5]
    cut_metrics(path, 4)
    assert path.read_text() == numbered(1, 3, 4)
    assert capsys.readouterr().out == f"{path}: 1 of 5 lines are damaged and left out\n"


@pytest.mark.parametrize("half", ['{"step": 3, "train/lo', '{"step": 3, "train/loss": 1', "{", "\0\0\0\0"])
def test_a_line_that_was_cut_short_is_dropped(tmp_path, half):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n' + half)
    open_writers(tmp_path, start_step=9).scalars(10, {"a": 10.0})
    assert [(line["step"], line["a"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1),
        (2, 2),
        (10, 10),
    ]


def test_a_last_line_without_its_newline_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}')
    open_writers(tmp_path, start_step=2).scalars(3, {"a": 3.0})
    assert [line["a"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_there_are_no_metrics_in_an_empty_workdir(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_what_measures_adds_to_the_metrics_of_a_workdir_and_cuts_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(numbered(5, 9))
    result = {"step": 7, "knn/top1": 0.5, "images": 3, "rankme": float("nan"), "sweep": [{"k": 1}], "flag": True}
    write_once(tmp_path, {"logging": {"writers": ()}}, 7, result)
    assert read_metrics(tmp_path / "metrics.jsonl")[2:] == [{"step": 7, "knn/top1": 0.5, "images": 3.0}]


def test_a_score_that_is_not_finite_is_left_out(tmp_path):
    open_writers(tmp_path).scalars(3, {"loss": np.float32(0.5), "rankme": float("nan"), "top1": float("inf")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "loss": 0.5}\n'


def test_a_writer_of_ones_own_gets_workdir_config_numbers_and_pictures_in_process_0_only(tmp_path, monkeypatch):
    (tmp_path / "my_writer.py").write_text(
        "class Writer:\n"
        "    def __init__(self, *built_from): self.log = log.append(built_from)\n"
        "    def scalars(self, *what): log.append(what)\n"
        "    def picture(self, *what): log.append(what)\n"
        "    def close(self): log.append('closed')\n"
        "log = []\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    check_writers(["my_writer:Writer"])
    writers = open_writers(tmp_path, "my_writer:Writer", start_step=3)
    writers.scalars(4, {"a": 1})
    writers.picture(4, "reconstructions", PICTURE)
    writers.close()
    built, *written = importlib.import_module("my_writer").log
    assert (built[0], built[1]["model"]["width"], built[2]) == (tmp_path, 768, 3)
    assert written == [(4, {"a": 1.0}), (4, "reconstructions", PICTURE), "closed"]
    monkeypatch.setattr(metrics, "is_main", lambda: False)
    open_writers(tmp_path / "elsewhere", "my_writer:Writer", "jsonl").scalars(5, {"a": 1})
    assert len(importlib.import_module("my_writer").log) == 4 and not (tmp_path / "elsewhere").exists()


def test_a_writer_that_is_not_known_or_not_installed_is_refused_with_the_remedy(monkeypatch):
    with pytest.raises(UserError, match='logging.writers=.tensorbord. is not one of .*; did you mean "tensorboard"'):
        check_writers(["jsonl", "tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_writers(["jsonl"])
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb"), ("mlflow", "mlflow")):
        with pytest.raises(UserError, match=f"logging.writers={name} needs .*: pip install {package}, or leave"):
            check_writers(["jsonl", name])


def read_events(workdir):
    """The events of all TensorBoard files of a folder, in the order that they were written."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(workdir.glob("events.out.tfevents.*"), key=os.path.getmtime):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_tensorboard_gets_numbers_pictures_and_the_config_and_hides_steps_that_are_made_again(tmp_path):
    writers = open_writers(tmp_path, "tensorboard")
    assert not list(tmp_path.glob("events*")), "the first step need not wait for tensorboardX"
    writers.scalars(3, {"eval/loss": 0.5})
    written = [(e.step, v.tag) for e in read_events(tmp_path) for v in e.summary.value]
    assert written == [(0, "config/text_summary"), (3, "eval/loss")], "on disk at once"
    writers.picture(3, "reconstructions", PICTURE)
    writers.close()
    *_, scalar, picture = read_events(tmp_path)
    assert scalar.summary.value[0].simple_value == 0.5
    assert (picture.summary.value[0].image.height, picture.summary.value[0].image.width) == (4, 6)
    again = open_writers(tmp_path, "tensorboard", start_step=2)
    again.scalars(3, {"eval/loss": 0.25})
    again.close()
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 3]


def test_wandb_offline_gets_the_config_numbers_and_pictures_and_a_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = tmp_path / "runs" / "digits"
    workdir.mkdir(parents=True)
    for start_step in (0, 3, 0):
        writers = open_writers(workdir, "wandb", start_step=start_step)
        writers.scalars(start_step + 1, {"train/loss": 0.125})
        writers.picture(start_step + 1, "reconstructions", PICTURE)
        writers.close()
    files = sorted((workdir / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime)
    first, second, third = (file.stem for file in files)
    assert first == second != third == "run-" + (workdir / "wandb_run.txt").read_text().strip()
    content = files[0].read_bytes()
    for text in (b"train/loss", b"0.125", b"decoder_num_heads", b"runs", b"digits"):
        assert text in content
    picture = next((workdir / "wandb").glob("offline-run-*/files/media/images/reconstructions*.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), PICTURE)


def test_wandb_that_cannot_log_in_is_a_mistake_that_names_the_offline_mode(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")

    def fail(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match="wandb cannot start: No API key configured.; log in, or set WANDB_MODE=offli"):
        open_writers(tmp_path, "wandb")


def test_mlflow_gets_the_config_numbers_and_pictures_in_files_and_a_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workdir = tmp_path / "runs" / "digits"
    workdir.mkdir(parents=True)
    for start_step in (0, 3):
        writers = open_writers(workdir, "mlflow", start_step=start_step)
        writers.scalars(start_step + 1, {"train/loss": 0.125})
        writers.picture(start_step + 1, "reconstructions", PICTURE)
        writers.close()
    client = mlflow.MlflowClient((workdir / "mlruns").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("runs").experiment_id])
    assert run.info.run_id == (workdir / "mlflow_run.txt").read_text().strip()
    assert (run.info.run_name, run.info.status) == ("digits", "FINISHED")
    assert run.data.params["model.mask_ratio"] == "0.75"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.125), (4, 0.125)]
    artifacts = workdir / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts"
    assert json.loads((artifacts / "config.json").read_text())["model"]["width"] == 768
    pictures = [path for path in (artifacts / "images").iterdir() if path.suffix == ".png"]
    assert len(pictures) == 2
    np.testing.assert_array_equal(np.asarray(Image.open(pictures[0])), PICTURE)


def test_an_mlflow_server_that_is_gone_is_a_mistake_at_the_start_and_a_line_later(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    writers = open_writers(tmp_path, "mlflow")

    def fail(*_, **__):
        raise mlflow.exceptions.MlflowException("no answer\nfrom it")

    monkeypatch.setattr(mlflow, "log_metrics", fail)
    monkeypatch.setattr(mlflow, "log_params", fail)
    writers.scalars(1, {"a": 1.0})
    assert capsys.readouterr().out == "MLflow could not log: no answer; the run goes on\n"
    writers.close()
    with pytest.raises(UserError, match="logging.writers=mlflow cannot start at .*: no answer"):
        open_writers(tmp_path, "mlflow")
    mlflow.end_run()
