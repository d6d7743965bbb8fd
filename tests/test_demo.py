"""The notebook docs/demo.ipynb as its readers find it: its outputs are there, and it runs from top to bottom."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import COMPILE_QUICKLY
from tests.runs import COMPILED, ROOT

NOTEBOOK = ROOT / "docs" / "demo.ipynb"
RUN_CELLS = """
import json, sys
import matplotlib
matplotlib.use("Agg")
names = {"__name__": "__main__"}
for cell in json.load(open(sys.argv[1]))["cells"]:
    if cell["cell_type"] == "code":
        source = "".join(cell["source"]).replace("in range(5)", "in range(1)")  # one random encoder is enough here
        exec(compile(source, cell["id"], "exec"), names)
"""


def code_cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_notebook_was_run_in_order_without_an_error_or_a_warning():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


def test_every_cell_that_draws_holds_its_picture():
    drawing = [cell for cell in code_cells() if "plt.subplots" in "".join(cell["source"])]
    assert len(drawing) == 4
    for cell in drawing:
        assert any("image/png" in output.get("data", {}) for output in cell["outputs"]), cell["id"]


def test_notebook_is_small_and_names_no_folder_of_the_machine_that_ran_it():
    assert NOTEBOOK.stat().st_size < 1_500_000
    printed = "".join("".join(output.get("text", "")) for cell in code_cells() for output in cell["outputs"])
    assert "demo/run" in printed
    assert not [word for word in printed.split() if word.startswith("/")]


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMPILE_QUICKLY, "DEMO_STEPS": "4"}
    env |= {"JAX_COMPILATION_CACHE_DIR": COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    command = [sys.executable, "-c", RUN_CELLS, str(NOTEBOOK)]
    done = subprocess.run(command, cwd=NOTEBOOK.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "done: 4 steps" in done.stdout and "demo/exported/model.safetensors" in done.stdout
