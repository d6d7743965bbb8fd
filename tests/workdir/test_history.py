"""What a run finds in its workdir: of others, of an earlier run, damaged, of the wrong kind, and links."""

import json
import os

import numpy as np
import pytest

from mae_jax.runtime.errors import UserError
from mae_jax.workdir.appending import Appender
from mae_jax.workdir.history import (
    check_folder,
    check_paths,
    cut_metrics,
    keep_earlier_measurement,
    keep_earlier_run,
    read_metrics,
)
from mae_jax.workdir.reporting import Reporter, provenance, save_picture
from mae_jax.workdir.writing import finite_or_null, make_temporary, read_object, write_atomically, write_json

OURS = '{"step": 1, "images_per_second": 9.0}\n'


def numbered(*steps):
    return "".join(f'{{"step": {step}}}\n' for step in steps)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


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


def test_a_reporter_goes_on_behind_a_damaged_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{numbered(1)}?\n{{"step": 3, "eval/loss": 1.0}}\n')
    reporter = Reporter(tmp_path, start_step=3, total_steps=9, batch_size=1, flops_per_image=lambda _: 1.0)
    assert reporter.has_evaluation(3)
    reporter.close()


def test_what_is_cut_in_the_usual_way_needs_no_room_on_the_disk(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(numbered(1, 2, 3) + '{"step": 4')
    file = path.stat().st_ino
    cut_metrics(path, 2)
    assert path.read_text() == numbered(1, 2) and path.stat().st_ino == file


def test_metrics_result_and_pictures_of_an_earlier_run_get_the_next_number_and_are_told(tmp_path, capsys):
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(numbered(number))
        (tmp_path / "metrics.png").touch()
        (tmp_path / "result.json").write_text(f"{number}")
        (tmp_path / "reconstructions").mkdir()
        keep_earlier_run(tmp_path)
    assert names_in(tmp_path) == [
        f"{name}.{number}{kind}"
        for name, kinds in (("metrics", (".jsonl", ".png")), ("reconstructions", ("",)), ("result", (".json",)))
        for number in (1, 2)
        for kind in kinds
    ]
    assert [(tmp_path / f"metrics.{number}.jsonl").read_text() for number in (1, 2)] == [numbered(1), numbered(2)]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("the run begins at step 0: ")
    assert lines[0].endswith(f"{tmp_path}/metrics.jsonl of an earlier one is kept as metrics.1.jsonl")
    keep_earlier_run(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("text", ["{", "[]", "7", '{"a": NaN}', ""])
def test_an_earlier_result_that_is_damaged_is_kept_too(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    keep_earlier_measurement(tmp_path, {"a": 1})
    assert (tmp_path / "result.1.json").read_text() == text and not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("task", ["pretrain", "classify", "knn", "evaluate"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("metrics.jsonl", '{"step": 1, "loss": 0.5}\n'), ("metrics.jsonl", "?"), ("config.json", '{"model": {}}'),
     ("config.json", '{"versions": "1"}'), ("config.json", "{"), ("classes.csv", "a,b"), ("eval_features.npy", "?")],
)  # fmt: skip
def test_a_folder_of_others_is_refused_in_one_line_and_stays_as_it_is(tmp_path, task, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        check_folder(tmp_path, task)
    assert str(error.value) == (
        f"--workdir={tmp_path} is no run's folder: its {name} is not of mae_jax; choose another folder"
    )
    assert names_in(tmp_path) == [name] and (tmp_path / name).read_text() == text


def test_a_folder_of_ours_is_taken_though_its_config_could_not_be_written_or_is_damaged(tmp_path):
    check_folder(tmp_path, "pretrain")
    (tmp_path / "log.txt").write_text("of the shell that starts it")
    check_folder(tmp_path, "pretrain")
    (tmp_path / "metrics.jsonl").touch()  # all that a run can write to a full disk
    check_folder(tmp_path, "pretrain")
    (tmp_path / "metrics.jsonl").write_text("?\n" + OURS)  # of a disk that was full at first
    check_folder(tmp_path, "pretrain")
    (tmp_path / "config.json").write_text(json.dumps({"task": "pretrain"} | provenance()))
    (tmp_path / "metrics.jsonl").write_text("")
    check_folder(tmp_path, "knn")
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "checkpoints" / "3" / "about").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "about" / "metadata").write_text("{}")
    check_folder(tmp_path, "pretrain")


def test_an_export_looks_itself_and_an_ablation_has_no_config_of_its_own(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    check_folder(tmp_path, "export")
    check_folder(tmp_path, "ablate")


FOLDERS = ["checkpoints", "checkpoints_set_aside", "reconstructions", "profile"]
FILES = ["config.json", "metrics.jsonl", "metrics.png", "result.json", "init_from.json", "status.json", "log.txt"]
FILES += ["table.md"]


@pytest.mark.parametrize("name", FOLDERS + FILES)
@pytest.mark.parametrize("task", ["pretrain", "ablate"])
def test_a_file_that_should_be_a_folder_or_the_other_way_round_is_found_before_anything_is_done(tmp_path, task, name):
    (tmp_path / name).touch() if name in FOLDERS else (tmp_path / name).mkdir()
    kind = "folder" if name in FOLDERS else "file"
    with pytest.raises(UserError, match=f"{name} is no {kind}, but a run needs it to be: move it away, or choose"):
        check_folder(tmp_path, task)


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.png", "config.json", "reconstructions", "profile"])
@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_among_the_files_of_a_run_is_found_before_anything_is_done(tmp_path, name, dangling):
    target, workdir = tmp_path / "target", tmp_path / "run"
    workdir.mkdir()
    if not dangling:
        target.mkdir() if name in FOLDERS else target.write_text(OURS)
    (workdir / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name} is a link, and a run writes through none: remove it"):
        check_paths(workdir)


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    check_paths(tmp_path)


def test_a_pipe_among_the_files_of_a_run_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert read_object(tmp_path / "config.json") is None
    with pytest.raises(UserError, match="config.json is no file"):
        check_paths(tmp_path)


WRITERS = {
    "config.json.tmp": lambda folder: write_json(folder / "config.json", {}),
    "1.png.tmp": lambda folder: save_picture(folder / "1.png", np.zeros((2, 2, 3), np.uint8)),
    "train_features.npy.tmp": lambda folder: make_temporary(folder / "train_features.npy").write_text("x"),
    "table.md": lambda folder: write_atomically(folder / "table.md", "x"),
    "metrics.jsonl": lambda folder: append(folder / "metrics.jsonl"),
    "events.out.tfevents.1": lambda folder: append(folder / "events.out.tfevents.1"),
}


def append(path):
    appender = Appender(path)
    appender.append(b"x")
    appender.close()


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_follows_a_link(tmp_path, name):
    target, workdir = tmp_path / "target", tmp_path / "run"
    target.write_text("precious")
    workdir.mkdir()
    (workdir / name).symlink_to(target)
    WRITERS[name](workdir)
    assert target.read_text() == "precious"
    assert not list(workdir.glob("*.tmp")) or name == "train_features.npy.tmp"


def test_no_json_file_gets_a_number_that_json_does_not_have(tmp_path):
    nan, inf = float("nan"), float("inf")
    for value in (nan, inf, -inf, np.float64(nan)):
        with pytest.raises(ValueError, match="JSON"):
            write_json(tmp_path / "result.json", {"a": [value]})
    assert names_in(tmp_path) == []
    measured = {"a": nan, "b": {"c": [inf, 1.5]}, "d": ("x", np.float64(-inf)), "e": 3, "f": None}
    write_json(tmp_path / "result.json", finite_or_null(measured))
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text) == {"a": None, "b": {"c": [None, 1.5]}, "d": ["x", None], "e": 3, "f": None}


def test_a_score_that_is_not_finite_is_left_out_of_the_metrics(tmp_path):
    reporter = Reporter(tmp_path, start_step=0, total_steps=9, batch_size=1, flops_per_image=lambda _: 1.0)
    reporter.scalars(3, {"loss": 0.5, "rankme": float("nan"), "top1": float("inf")}, prefix="eval/")
    reporter.training(4, {"loss": float("inf"), "grad_norm": 1.0}, seconds=1.0, steps=1, waited=0.0)
    reporter.close()
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {"step": 3, "eval/loss": 0.5}
    assert "train/loss" not in json.loads(second) and json.loads(second)["train/grad_norm"] == 1.0
