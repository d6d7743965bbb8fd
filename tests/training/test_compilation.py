"""Steps for images of several sizes, and what each of them costs."""

from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits, finetune_digits
from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import train_flops
from mae_jax.objectives import pretrain
from mae_jax.objectives.classify import Classification
from mae_jax.runtime import memory
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import batch_sharding, create, put_batch
from mae_jax.training import plan as training_plan
from mae_jax.training.plan import compile_plan, describe_plan, make_plan, make_train_key
from tests.meshes import device_mesh
from tests.runs import TINY_SETTINGS

RESOLUTIONS = ((0.5, 4), (0.75, (6, 8)))


def planned(*resolutions, module=digits, objective_class=pretrain.Pretraining, workdir=Path("nowhere")):
    """(config, objective, mesh, plan) of a run of 8 steps of a tiny model."""
    config, mesh = module.get_config(), device_mesh()
    config.update_from_flattened_dict(TINY_SETTINGS | {"train.steps": 8, "train.resolutions": resolutions})
    objective = objective_class(config, workdir, mesh)
    return config, objective, mesh, make_plan(config, objective, mesh)


def test_the_shape_of_the_images_decides_which_step_runs(monkeypatch):
    _, objective, mesh, plan = planned((0.5, 4))

    def compile_fake(step_fn, state, batch, key, mesh):
        size = batch["image"].shape[1]
        return Fake(batch, lambda state, batch, key: (state + size, {}))

    monkeypatch.setattr(training_plan, "compile_train_step", compile_fake)
    step, _ = compile_plan(plan, objective, 0, None, mesh)
    batches = [{"image": np.zeros((2, size, size, 1))} for size in (4, 8, 4)]
    assert [step(0, batch, None)[0] for batch in batches] == [4, 8, 4]


@pytest.mark.parametrize("start_step, sizes", [(0, [(4, 4), (6, 8), (8, 8)]), (4, [(6, 8), (8, 8)]), (7, [(8, 8)])])
def test_what_is_still_to_come_is_compiled_once_each_and_told(monkeypatch, start_step, sizes):
    _, objective, mesh, plan = planned(*RESOLUTIONS)
    seen = []

    def compile_fake(step_fn, state, batch, key, mesh):
        seen.append(batch["image"])
        return jax.jit(lambda: 0).lower().compile()

    monkeypatch.setattr(training_plan, "compile_train_step", compile_fake)
    _, lines = compile_plan(plan, objective, start_step, make_train_key(0, mesh), mesh)
    assert [image.shape for image in seen] == [(64, *size, 1) for size in sizes]
    assert {image.dtype for image in seen} == {np.dtype(np.uint8)}
    assert [line.split(" compiled in")[0] for line in lines] == [
        f"  step      of {height} x {width} pixels" for height, width in sizes
    ]


def test_without_stages_the_step_that_runs_is_the_compiled_one_itself(monkeypatch):
    _, objective, mesh, plan = planned()
    monkeypatch.setattr(training_plan, "compile_train_step", lambda _, __, batch, *___: Fake(batch))
    step, _ = compile_plan(plan, objective, 0, None, mesh)
    assert step.batch is objective.batch
    assert compile_plan(plan, objective, 8, None, mesh) == (plan.step_fn, [])  # all is done


def test_a_step_beyond_the_memory_is_refused_when_it_is_compiled(monkeypatch):
    _, objective, mesh, plan = planned()
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    with pytest.raises(UserError, match="a step needs .* MiB of memory, but this machine, or its container, has 0 MiB"):
        compile_plan(plan, objective, 0, make_train_key(0, mesh), mesh)


class Fake:
    """What was compiled."""

    def __init__(self, batch, call=None):
        self.batch, self._call = batch, call

    def __call__(self, state, batch, key):
        return self._call(state, batch, key)

    def memory_analysis(self):
        return jax.jit(lambda: 0).lower().compile().memory_analysis()


def test_the_loss_of_a_step_of_small_images_is_that_of_a_model_of_their_size():
    config, objective, mesh, plan = planned((0.5, 4))
    key = make_train_key(0, mesh)
    step, _ = compile_plan(plan, objective, 0, key, mesh)
    state = create(plan.init, jax.random.key(0), mesh)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), np.uint8)
    small = pretrain.make_loss_fn(config, MAEConfig(**config.model.to_dict() | {"image_size": 4}))
    keys = jax.random.split(jax.random.fold_in(key, 0), 64)
    expected, _ = jax.jit(small)(state.params, {}, {"image": pixels}, keys)
    _, scalars = step(state, put_batch({"image": pixels}, batch_sharding(mesh)), key)
    assert scalars["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_operations_of_a_step_are_those_of_its_own_size():
    config, objective, _, _ = planned()
    for size in ((4, 4), (6, 8), (8, 8)):
        expected = train_flops(MAEConfig(**config.model.to_dict() | {"image_size": size}))
        assert objective.train_flops(size) == expected


def test_the_operations_of_a_classifiers_step_are_those_of_its_own_size(tmp_path):
    _, objective, _, _ = planned(module=finetune_digits, objective_class=Classification, workdir=tmp_path)
    # Nearly in proportion to the patches: 4 of 16.
    assert 0.2 < objective.train_flops((4, 4)) / objective.train_flops((8, 8)) < 0.35


def test_the_summary_names_the_stages_only_if_there_are_several():
    (line,) = [line for line in describe_plan(*planned(*RESOLUTIONS)) if "stages" in line]
    assert "4 x 4 pixels up to step 4 (" in line and "; 6 x 8 pixels up to step 6 (" in line
    assert "; 8 x 8 pixels up to step 8 (" in line and line.count("FLOP an image") == 3
    assert not any("stages" in line for line in describe_plan(*planned()))
