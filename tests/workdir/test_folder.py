"""What a run finds in its workdir: of others, of an earlier run, damaged, of the wrong kind, and links."""

import json
import os

import pytest

from mae_jax.runtime.errors import UserError
from mae_jax.workdir.folder import check_folder, check_paths, keep_earlier_measurement, keep_earlier_run
from mae_jax.workdir.reporting import provenance
from mae_jax.workdir.writing import read_object


def numbered(*steps):
    return "".join(f'{{"step": {step}}}\n' for step in steps)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


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
        f"--workdir={tmp_path} is not a run's workdir: {name} is another program's; choose another folder"
    )
    assert names_in(tmp_path) == [name] and (tmp_path / name).read_text() == text


def test_a_folder_of_ours_is_taken_though_its_config_is_damaged(tmp_path):
    check_folder(tmp_path, "pretrain")
    (tmp_path / "log.txt").write_text("of the shell that starts it")
    check_folder(tmp_path, "pretrain")
    (tmp_path / "metrics.jsonl").touch()  # nothing is lost with it
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
    with pytest.raises(UserError, match=f"{name} is not a {kind}, as a run needs: move it away, or choose"):
        check_folder(tmp_path, task)


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.png", "config.json", "reconstructions", "profile"])
@pytest.mark.parametrize("dangling", [True, False])
def test_a_link_among_the_files_of_a_run_is_found_before_anything_is_done(tmp_path, name, dangling):
    target, workdir = tmp_path / "target", tmp_path / "run"
    workdir.mkdir()
    if not dangling:
        target.mkdir() if name in FOLDERS else target.write_text("{}")
    (workdir / name).symlink_to(target)
    with pytest.raises(UserError, match=f"{name} is a link, which a run does not follow: remove it"):
        check_paths(workdir)


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    check_paths(tmp_path)


def test_a_pipe_among_the_files_of_a_run_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    assert read_object(tmp_path / "config.json") is None
    with pytest.raises(UserError, match="config.json is not a file"):
        check_paths(tmp_path)
