import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.common import get_config
from mae_jax.objectives.objective import Variables
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import create
from mae_jax.training.step import TrainState, abstract_state, make_init
from mae_jax.workdir.checkpoints import CHECKSUMS, Checkpoints, check_fits, find_damage
from tests.meshes import device_mesh

OPTIMIZER = optax.adamw(0.1, mask={"a": {"kernel": True, "bias": False}})


def init_params(key):
    return {"a": {"kernel": jax.random.normal(key, (300, 400)), "bias": jnp.linspace(-1e-30, 1e30, 7)}}


INIT = make_init(lambda key: Variables(init_params(key)), OPTIMIZER)


@pytest.fixture(scope="module")
def step_fn():
    """A donating step that changes every array."""

    def step(state):
        grads = jax.tree.map(jnp.cos, state.params)
        updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

    return jax.jit(step, donate_argnums=0)


@pytest.fixture
def new_state():
    return create(INIT, jax.random.key(0), device_mesh(1))


@pytest.fixture
def open_checkpoints(tmp_path):
    """Returns a function that opens the test's folder: checkpoint settings by name -> Checkpoints."""
    with contextlib.ExitStack() as stack:

        def open_(config=None, **changes):
            config = config or get_config()
            config.checkpoint.update(changes)
            return stack.enter_context(contextlib.closing(Checkpoints(tmp_path, config.checkpoint, config.to_dict())))

        yield open_


def copy(state):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_every_bit_comes_back_though_steps_overwrite_the_buffers_while_the_save_is_running(
    open_checkpoints, new_state, step_fn
):
    checkpoints, state, saved = open_checkpoints(keep=10), new_state, {}
    for step in range(1, 13):
        state = step_fn(state)
        if step % 4 == 0:
            saved[step] = copy(state)
            checkpoints.save(step, state)
    checkpoints.wait()
    again = open_checkpoints(keep=10)
    for step, expected in saved.items():
        restored = again.restore(step, abstract_state(INIT, device_mesh(1)))
        assert int(restored.step) == step
        assert_same_bits(restored, expected)


@pytest.mark.parametrize("devices", [1, 8])
def test_frozen_parameters_running_statistics_and_moving_average_come_back_too(open_checkpoints, devices):
    def init_variables(key):
        frozen = {"a": {"kernel": jax.random.normal(key, (3, 2))}}  # the first rows of a stack, whose last ones train
        return Variables(init_params(key), frozen, {"b": {"mean": jnp.arange(5.0), "variance": jnp.ones(5)}})

    init = make_init(init_variables, OPTIMIZER, keep_average=True)
    state = create(init, jax.random.key(1), device_mesh(1))
    state = state._replace(average=jax.tree.map(lambda leaf: leaf + 1, state.params))
    checkpoints = open_checkpoints()
    checkpoints.save(7, state)
    checkpoints.wait()
    restored = checkpoints.restore(7, abstract_state(init, device_mesh(devices)))
    assert_same_bits(restored, copy(state._replace(step=jnp.int32(7))))


def test_a_state_saved_on_one_device_is_restored_onto_eight(open_checkpoints, new_state):
    checkpoints = open_checkpoints()
    checkpoints.save(3, new_state)
    checkpoints.wait()
    restored = checkpoints.restore(3, abstract_state(INIT, device_mesh(8)))
    assert_same_bits(restored.params, copy(new_state.params))
    for leaf in jax.tree.leaves(restored):
        assert len(leaf.sharding.device_set) == 8


def test_the_newest_checkpoints_and_those_at_multiples_are_kept(open_checkpoints, new_state, tmp_path):
    checkpoints = open_checkpoints(keep=2, keep_every_steps=4)
    for step in range(1, 11):
        checkpoints.save(step, new_state)
    checkpoints.wait()
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == {4, 8, 9, 10}


class Killed(BaseException):
    """What no `except Exception` sees."""


def test_a_run_killed_before_it_writes_the_checksums_goes_on_from_that_checkpoint_and_writes_them(
    open_checkpoints, new_state, tmp_path, monkeypatch
):
    def stop(_):
        raise Killed

    checkpoints, expected = open_checkpoints(), copy(new_state)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("mae_jax.workdir.checkpoints.write_checksums", stop)
        checkpoints.save(2, new_state)
        checkpoints.wait()
    again = open_checkpoints()
    assert again.newest_whole() == 2 and not (tmp_path / "checkpoints" / "2" / CHECKSUMS).exists()
    assert_same_bits(again.restore(2, abstract_state(INIT, device_mesh(1))).params, expected.params)
    assert (tmp_path / "checkpoints" / "2" / CHECKSUMS).exists()
    assert find_damage(tmp_path / "checkpoints" / "2") is None


def test_there_is_no_newest_step_in_an_empty_workdir(open_checkpoints):
    assert open_checkpoints().latest_step() is None


def test_a_step_that_is_saved_is_left_alone(open_checkpoints, new_state, step_fn):
    checkpoints, expected = open_checkpoints(), copy(new_state.params)
    checkpoints.save(5, new_state)
    checkpoints.save(5, step_fn(new_state))
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(5, abstract_state(INIT, device_mesh(1))).params, expected)


def test_regular_saves_fall_on_multiples_but_not_on_0(open_checkpoints):
    checkpoints = open_checkpoints(every_steps=3)
    assert [step for step in range(10) if checkpoints.due(step)] == [3, 6, 9]


def set_value(config, key, value):
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    with config.ignore_type():
        config[name] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.width", 132), ("model.depth", 5), ("model.patch_size", 7), ("model.mask_ratio", 0.6),
        ("model.normalize_targets", False), ("model.norm_epsilon", 1e-12), ("seed", 1), ("data.seed", 1),
        ("data.batch_size", 77), ("data.name", "cifar10"), ("task", "reconstruct"),
    ],
)  # fmt: skip
def test_a_run_with_another_model_or_other_data_cannot_go_on_and_is_told_which_setting(
    open_checkpoints, new_state, key, value
):
    checkpoints = open_checkpoints()
    checkpoints.save(2, new_state)
    checkpoints.wait()
    config = get_config()
    set_value(config, key, value)
    with pytest.raises(UserError, match=rf"checkpoint 2 .*{key}=.*{value!r}"):
        open_checkpoints(config).newest_whole()


def test_settings_of_speed_length_and_reporting_may_change_and_are_listed(open_checkpoints, new_state):
    checkpoints = open_checkpoints()
    checkpoints.save(2, new_state)
    checkpoints.wait()
    config = get_config()
    changes = {
        "model.dtype": "bfloat16", "model.remat": True, "model.scan_unroll": 2, "train.epochs": 7.0,
        "train.accumulate_steps": 2, "train.log_every_steps": 3, "data.num_threads": 1, "data.path": "elsewhere",
        "checkpoint.every_steps": 9, "optimizer.base_learning_rate": 1e-9, "mesh.data": 1,
    }  # fmt: skip
    before = {}
    for key, value in changes.items():
        before[key] = config
        for part in key.split("."):
            before[key] = before[key][part]
        set_value(config, key, value)
    found = open_checkpoints(config).changed_settings(2)
    assert found == {key: (before[key], value) for key, value in changes.items()}


def test_unchanged_settings_fit_though_json_has_no_tuples(open_checkpoints, new_state):
    config = get_config()
    set_value(config, "model.image_size", (8, 8))
    checkpoints = open_checkpoints(config)
    checkpoints.save(2, new_state)
    checkpoints.wait()
    assert open_checkpoints(config).changed_settings(2) == {}


def test_which_settings_the_command_line_gave_is_no_change(open_checkpoints, new_state):
    config = get_config()
    checkpoints = open_checkpoints(config)
    checkpoints.save(2, new_state)
    checkpoints.wait()
    set_value(config, "given", ("train.steps",))
    assert open_checkpoints(config).changed_settings(2) == {}


def test_a_setting_that_is_gone_does_not_fit_and_one_that_is_new_since_does():
    with pytest.raises(UserError, match="model.old=3.*model.old=None"):
        check_fits({"model": {"width": 8, "old": 3}}, {"model": {"width": 8}}, "checkpoint 1")
    check_fits({"model": {"width": 8}}, {"model": {"width": 8, "new": 3}}, "checkpoint 1")


def test_a_run_keeps_its_value_range_and_one_of_a_version_without_it_may_set_it():
    with pytest.raises(UserError, match="data.value_range=None, this run data.value_range="):
        check_fits({"data": {"value_range": None}}, {"data": {"value_range": (0, 4095)}}, "checkpoint 1")
    check_fits({"data": {"value_range": [0, 4095]}}, {"data": {"value_range": (0, 4095)}}, "checkpoint 1")
    check_fits({"data": {}}, {"data": {"value_range": (0, 4095)}}, "checkpoint 1")


def test_a_run_of_an_earlier_version_is_refused_with_the_way_to_keep_its_weights(
    open_checkpoints, new_state, monkeypatch
):
    monkeypatch.setattr("mae_jax.workdir.checkpoints.LAYOUT", 1)
    checkpoints = open_checkpoints()
    checkpoints.save(1, new_state)
    checkpoints.wait()
    monkeypatch.undo()
    with pytest.raises(UserError, match="--config.init_from="):
        open_checkpoints().newest_whole()


def test_the_number_of_updates_left_out_is_kept(open_checkpoints, new_state):
    checkpoints = open_checkpoints()
    checkpoints.save(4, new_state._replace(step=jnp.int32(4), skipped=jnp.int32(2)))
    checkpoints.wait()
    restored = checkpoints.restore(4, abstract_state(INIT, device_mesh(8)))
    assert (int(restored.step), int(restored.skipped)) == (4, 2)
