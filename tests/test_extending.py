"""The examples of docs/extending.md, as their readers copy them."""

import json
import re
import shlex

import pytest

from tests.runs import ROOT, TINY, WITHOUT_TORCH, read_json, run

SECTIONS = (ROOT / "docs" / "extending.md").read_text().split("\n## ")[1:]
FEW = ("--config.train.steps=2", "--config.evaluate.random_encoder=False")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The folder with every example's file, and the settings of each section's command by the section's title."""
    folder, settings = tmp_path_factory.mktemp("examples"), {}
    for section in SECTIONS:
        title = section.split("\n", 1)[0]
        (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        (folder / code.split("\n", 1)[0].removeprefix("# ")).write_text(code)
        (command,) = re.findall(r"\n    (python main\.py (?:[^\\\n]|\\\n)*)", section)
        words = shlex.split(command.replace("\\\n", ""))
        settings[title] = [word for word in words if word.startswith("--config.")]
    return folder, settings


def run_with(folder, settings, workdir):
    path = f"{folder}:{WITHOUT_TORCH}:{ROOT}"
    code, out, err = run(*TINY, *FEW, *settings, f"--workdir={workdir}", PYTHONPATH=path)
    assert code == 0, out + err


@pytest.mark.slow
def test_every_example_but_the_objective_works_and_all_of_them_together(examples):
    folder, settings = examples
    own = [setting for title, several in settings.items() if title != "An objective" for setting in several]
    run_with(folder, own, folder / "run")
    config = read_json(folder / "run" / "config.json")
    for setting in own:
        key, value = setting.removeprefix("--config.").split("=", 1)
        group, name = key.split(".")
        assert str(config[group][name]) == value or isinstance(config[group][name], list)
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "eval/centring" in metrics[-1]
    assert (folder / "run" / "losses.csv").read_text().startswith("1,")


@pytest.mark.slow
def test_the_example_of_an_objective_trains_it(examples, tmp_path):
    folder, settings = examples
    run_with(folder, settings["An objective"], tmp_path)
    assert read_json(tmp_path / "result.json")["eval/loss"] > 0


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split("\n", 1)[0])
def test_an_example_is_short(section):
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(code.splitlines()) <= 22
