"""Pre-training as its users see it, and objectives that derive from it."""

import importlib

import jax
import pytest
from PIL import Image

from configs import small_photos
from mae_jax.objectives.pretrain import Pretraining
from tests.meshes import device_mesh
from tests.runs import read_json, run_task


@pytest.mark.parametrize(
    "folders, told",
    [(("leaf", "sky"), "2: leaf, sky"), (("",), "none, which leaves k-NN and the linear probe out")],
)
def test_the_summary_names_the_classes_or_says_that_there_are_none(folders, told, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir(exist_ok=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    config = small_photos.get_config()
    config.data.update(path=str(tmp_path), eval_fraction=0.25, batch_size=2)
    objective = Pretraining(config, tmp_path / "run", device_mesh(1))
    assert objective.describe(jax.eval_shape(objective.init, jax.random.key(0)))["classes"] == told


OWN = """
from mae_jax.objectives.pretrain import Pretraining

class Negatives(Pretraining):
    evaluators = ("loss", "own_objective:Brightness")

    calls = 0

    def loss_fn(self, params, frozen, batch, keys):
        Negatives.calls += 1
        return super().loss_fn(params, frozen, batch | {"image": 255 - batch["image"]}, keys)

class Brightness:
    def __init__(self, config, data):
        self.data = data

    def run(self, state):
        yield "brightness", float(sum(self.data.evaluation[i]["image"].mean() for i in range(4)))
"""


@pytest.mark.slow
def test_an_objective_of_ones_own_trains_and_is_measured_by_its_own_evaluators(one_device, tmp_path, monkeypatch):
    (tmp_path / "own_objective.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    run_task("digits", tmp_path, task="own_objective:Negatives", train__steps=1, model__scan_unroll=1)
    result = read_json(tmp_path / "result.json")
    assert result.keys() == {"step", "eval/loss", "brightness"} and min(result.values()) > 0
    assert importlib.import_module("own_objective").Negatives.calls == 1
