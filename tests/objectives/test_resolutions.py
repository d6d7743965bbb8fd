"""Runs whose images grow, from their beginning and from their checkpoints; also with Muon."""

import json
import shutil

import numpy as np
import pytest

from mae_jax.interop.weights import load
from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import train_flops
from tests.runs import losses, mistake, read_checkpoint, read_json, run_task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
# Stages from steps 0 and 8; what Muon's state must survive is in it too.
SETTINGS = {
    "model__scan_unroll": 1, "model__positions": "learned", "train__steps": 16, "train__log_every_steps": 3,
    "train__resolutions": ((0.5, 4),), "checkpoint__every_steps": 5, "checkpoint__keep": 9,
    "evaluate__evaluators": ("loss",),
    "optimizer__name": "muon", "train__accumulate_steps": 2, "train__ema_decay": 0.9, "train__skip_nonfinite": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(compile_once, one_device, tmp_path_factory):
    """The workdir of a run that nothing happened to."""
    return run_task("digits", tmp_path_factory.mktemp("resolutions") / "unbroken", **SETTINGS)


@pytest.mark.parametrize("step", [5, 10])
def test_a_run_that_goes_on_from_either_stage_ends_with_the_same_bits(unbroken, tmp_path, capsys, step):
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    (tmp_path / "result.json").unlink()  # as if it had been killed before the next checkpoint
    for later in (5, 10, 15, 16):
        if later > step:
            shutil.rmtree(tmp_path / "checkpoints" / str(later))
    run_task("digits", tmp_path, **SETTINGS)
    out = capsys.readouterr().out
    assert f"going on from checkpoint {step}" in out and "changed" not in out
    assert out.count(" pixels compiled in ") == {5: 2, 10: 1}[step]
    ours, theirs = read_checkpoint(tmp_path, 16), read_checkpoint(unbroken, 16)
    assert ours.keys() == theirs.keys() and any("['muon']" in name for name in ours)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert read_json(tmp_path / "result.json") == read_json(unbroken / "result.json")
    assert losses(tmp_path) == losses(unbroken)


def test_the_speed_in_operations_counts_the_size_of_each_step(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    model = {**read_json(unbroken / "config.json")["model"]}
    sizes = [4] * 8 + [8] * 8
    flops = [train_flops(MAEConfig(**model | {"image_size": size})) for size in sizes]
    found = {line["step"]: 1e12 * line["tflops_per_second"] / line["images_per_second"] for line in lines
             if "tflops_per_second" in line}  # fmt: skip
    steps = [0, 1, 3, 6, 9, 12, 15, 16]
    assert list(found) == steps[1:]
    for before, step in zip(steps, steps[1:], strict=False):
        assert found[step] == pytest.approx(np.mean(flops[before:step])), step


def test_the_model_that_comes_out_has_the_full_size(unbroken):
    assert load(unbroken).config.image_size == (8, 8)


def test_more_steps_than_can_be_counted_are_refused(tmp_path):
    message = mistake("digits", tmp_path, train__steps=None, train__epochs=1e30)
    assert message.startswith("train.epochs=1e+30 is more than 2,147,483,647 steps")


def test_a_classifier_learns_from_images_that_grow(unbroken, tmp_path, capsys):
    settings = {"init_from": str(unbroken), "train__resolutions": ((0.5, 4),), "model__scan_unroll": 1}
    workdir = run_task("finetune_digits", tmp_path, **settings, train__steps=4)
    assert "stages    4 x 4 pixels up to step 2" in capsys.readouterr().out
    assert 0 <= read_json(workdir / "result.json")["eval/top1"] <= 1


@pytest.mark.parametrize(
    "name, resolutions, message",
    [
        ("finetune_digits", ((0.5, 3),), "not 3 x 3 pixels: patch size 2 does not divide"),
        ("linear_probe_digits", ((0.5, 4),), "a frozen encoder's features are computed once"),
    ],
)
def test_resolutions_that_a_checkpoint_does_not_allow_are_one_line(unbroken, tmp_path, name, resolutions, message):
    settings = dict(init_from=str(unbroken), train__resolutions=resolutions)
    assert message in mistake(name, tmp_path / "run", **settings)
