"""What would make each step wait: tracing again, and values that go between host and device unasked."""

import contextlib
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from mae_jax.objectives import pretrain
from mae_jax.objectives.objective import LossDetails
from mae_jax.runtime import hlo
from mae_jax.runtime.mesh import batch_sharding, create, put_batch
from mae_jax.training.plan import compile_train_step, make_plan, make_train_key
from tests.meshes import device_mesh
from tests.runs import TINY_SETTINGS, run_task
from tests.training.test_loop import Run, State

BATCH = 64


@pytest.fixture
def traced(monkeypatch) -> list[tuple[int, ...]]:
    """The shape of the images each time that Python runs the loss function of pre-training."""
    shapes, make = [], pretrain.make_loss_fn

    def make_loss_fn(config, model):
        loss_fn = make(config, model)

        def counted(params, frozen, batch, keys):
            shapes.append(batch["image"].shape)
            return loss_fn(params, frozen, batch, keys)

        return counted

    monkeypatch.setattr(pretrain, "make_loss_fn", make_loss_fn)
    return shapes


def steps_done(workdir: Path) -> int:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return max(line["step"] for line in lines)


# Eight devices, as the tests have; what is measured at the end is not the matter.
USUAL = {"mesh__data": 8, "data__batch_size": BATCH, "evaluate__linear_probe": False, "evaluate__random_encoder": False}


@pytest.mark.slow
def test_a_whole_run_traces_its_step_once_for_each_size_of_its_images(traced, tmp_path):
    # Real batches of the loader; 1,437 digits are no multiple of the batch, and the run goes over the end of an epoch
    # with images of the full size.
    growing = {"train__resolutions": ((0.1, 4),)}
    run_task("digits", tmp_path, train__steps=30, evaluate__every_steps=10, **growing, **USUAL)
    assert steps_done(tmp_path) == 30
    assert traced == [(BATCH // 8, 4, 4, 1), (BATCH // 8, 8, 8, 1)]


@functools.cache
def compiled_step(*, accumulate=1, devices=1, loss=lambda loss_fn: loss_fn):
    """(compiled step, function that makes its first state, key, mesh) of the digits' pre-training with flips.

    `loss` changes the loss function.
    """
    config, mesh = digits.get_config(), device_mesh(devices)
    config.update_from_flattened_dict(TINY_SETTINGS | {"data.batch_size": BATCH, "train.accumulate_steps": accumulate})
    config.data.flip = True
    objective = pretrain.Pretraining(config, Path("nowhere"), mesh)
    objective.loss_fn = loss(objective.loss_fn)
    plan, key = make_plan(config, objective, mesh), make_train_key(0, mesh)
    step = compile_train_step(plan.step_fn, plan.abstract, objective.batch, key, mesh)
    return step, functools.partial(create, plan.init, jax.random.key(0), mesh), key, mesh


def talks_to_host(compiled: jax.stages.Compiled) -> list[str]:
    """What in a compiled program goes to the host or comes from it."""
    found = []
    for instructions in hlo.parse(compiled.as_text()).computations.values():
        for instruction in instructions:
            target = instruction.attributes if instruction.opcode == "custom-call" else ""
            if instruction.opcode.split("-")[0] in ("infeed", "outfeed", "send", "recv") or "callback" in target:
                found.append(f"{instruction.opcode} {target}")
    return found


def pixels(step: int) -> dict:
    return {"image": np.random.default_rng(step).integers(0, 256, (BATCH, 8, 8, 1), np.uint8)}


@pytest.mark.parametrize(("accumulate", "devices"), [(1, 1), (4, 8)])
def test_no_step_sends_to_the_host_or_waits_for_it(accumulate, devices):
    step, make_state, key, mesh = compiled_step(accumulate=accumulate, devices=devices)
    state = make_state()
    assert len(step.as_text()) > 10_000 and not talks_to_host(step)
    batches = [put_batch(pixels(index), batch_sharding(mesh)) for index in range(3)]
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, scalars = step(state, batch, key)
    assert int(state.step) == 3 and np.isfinite(float(scalars["loss"]))


def test_a_step_that_calls_python_would_be_found():
    def chatty(loss_fn):
        def wrapped(params, frozen, batch, keys):
            jax.debug.callback(lambda x: None, batch["image"][0, 0, 0, 0])
            return loss_fn(params, frozen, batch, keys)

        return wrapped

    step, *_ = compiled_step(loss=chatty)
    assert talks_to_host(step)


def eager(params, frozen, batch, keys):
    """A loss that takes numbers of the host into a sum that the device makes, outside of any compiled program."""
    return jnp.sum(params["w"] * np.arange(4.0, dtype=np.float32)), LossDetails()


@pytest.mark.parametrize("mistake", ["a batch of the host", "an eager loss", None])
def test_the_loop_refuses_a_batch_of_the_host_and_a_loss_that_takes_arrays_of_the_host(mistake):
    compiled, make_state, key, mesh = compiled_step()
    real_state, params = make_state(), {"w": jnp.ones(4)}

    class Real(Run):
        """The loop of the tests, around the real step."""

        def batches(self):
            for index in super().batches():
                yield pixels(index) if mistake == "a batch of the host" else put_batch(pixels(index), sharding)

        def step_fn(self, state, batch, _):
            nonlocal real_state
            if mistake == "an eager loss":
                eager(params, {}, batch, None)
            real_state, scalars = compiled(real_state, batch, key)
            return State(state.step + 1, ()), scalars

    sharding, run = batch_sharding(mesh), Real(total=3)
    expected = pytest.raises(Exception, match="[Dd]isallowed") if mistake else contextlib.nullcontext()
    with expected:
        run()
    assert int(real_state.step) == (0 if mistake else 3)
