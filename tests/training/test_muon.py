"""Muon, against its update written out in NumPy, and against AdamW for what is none of its matrices."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from configs.common import get_config
from mae_jax.models.classifier import ClassifierConfig, init_classifier, split_classifier
from mae_jax.models.mae import MAEConfig, init_params
from mae_jax.models.parameters import count_parameters
from mae_jax.runtime.mesh import create, parameter_shardings, parameter_specs, put
from mae_jax.training.optimizers import make_optimizer, make_schedule
from tests.meshes import device_mesh
from tests.reference import random_like
from tests.runtime.test_sharding import assert_close, one_step

MODEL = MAEConfig((8, 12), 4, 3, 32, 3, 8, 2.0, 16, 2, 8)
QKV = ("encoder", "blocks", "attention", "qkv", "kernel")
LAYERS = ("attention/qkv", "attention/out", "mlp/fc1", "mlp/fc2")
MATRICES = {("encoder", "blocks", *layer.split("/"), "kernel") for layer in LAYERS}


def muon_settings(**changes):
    settings = get_config().optimizer
    settings.update({"name": "muon"} | changes)
    return settings


@functools.cache
def values(seed: int) -> dict:
    """Random values of a model's parameters, by path; its decoder's only block has cross-attention alone."""
    tree = random_like(jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0))), seed)
    rng = np.random.default_rng(seed)
    cross = {"q": {"kernel": rng.normal(size=(2, 16, 16))}, "kv": {"kernel": rng.normal(size=(2, 32, 2, 16))}}
    tree["decoder"]["blocks"] = {"attention": jax.tree.map(np.float32, cross)}
    return flatten_dict(tree)


def drawn(step: int) -> dict:
    """Random gradients."""
    return values(10 + step)


def updates_of(settings, steps=1, gradients=drawn, schedule=lambda _: 0.1, params=None, **options):
    """The updates of the last of some steps from `values(0)`, by path."""
    optimizer, params = make_optimizer(settings, schedule, **options), unflatten_dict(params or values(0))
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(unflatten_dict(gradients(step)), state, params)
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(updates).items()}


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Five steps of the quintic Newton-Schulz iteration of Jordan et al., in float64."""
    if len(matrix) > matrix.shape[1]:
        return orthogonalised(matrix.T).T
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def matrices(array: np.ndarray) -> list[np.ndarray]:
    """The matrices in a kernel [depth, inputs, outputs] or [depth, inputs, count, outputs], in order."""
    stacks = [array] if array.ndim == 3 else [array[:, :, i] for i in range(array.shape[2])]
    return [block for stack in stacks for block in stack]


def numpy_muon(params: np.ndarray, gradients: tuple, *, rate: float, decay: float, beta: float = 0.95) -> np.ndarray:
    """The last update of one matrix: -rate (0.2 sqrt(max(inputs, outputs)) NS5(momentum) + decay p), in float64.

    The momentum is Nesterov's with Dozat's corrections of its bias (2016, "Incorporating Nesterov momentum into Adam").
    """
    moment = np.zeros(params.shape)
    for gradient in np.asarray(gradients, np.float64):
        moment = beta * moment + (1 - beta) * gradient
    t = len(gradients)
    nesterov = beta * moment / (1 - beta ** (t + 1)) + (1 - beta) * gradient / (1 - beta**t)
    return -rate * (0.2 * np.sqrt(max(params.shape)) * orthogonalised(nesterov) + decay * params)


@pytest.mark.parametrize("steps", [4])
def test_the_update_of_each_matrix_is_that_of_numpy(steps):
    found = updates_of(muon_settings(weight_decay=0.3), steps)
    paths = [path for path in found if "blocks" in path and path[-1] == "kernel"]
    assert set(paths) > MATRICES and len(paths) == len(MATRICES) + 2  # with those of cross-attention
    for path in paths:
        gradients = zip(*(matrices(drawn(step)[path]) for step in range(steps)), strict=True)
        for ours, p, g in zip(matrices(found[path]), matrices(values(0)[path]), gradients, strict=True):
            expected = numpy_muon(p.astype(np.float64), g, rate=0.1, decay=0.3)
            # float32 through five products, each of which can grow a small singular value's error by 3.4.
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=str(path))


@pytest.mark.parametrize("decay_tokens", [True, False])
def test_everything_else_gets_the_update_of_adamw(decay_tokens):
    changes = dict(weight_decay=0.3, b1=0.8, b2=0.9, epsilon=1e-6)
    found = updates_of(muon_settings(**changes), 3, decay_tokens=decay_tokens)
    expected = updates_of(muon_settings(**changes | {"name": "adamw"}), 3, decay_tokens=decay_tokens)
    rest = [path for path in expected if "blocks" not in path or path[-1] != "kernel"]
    assert {path[-1] for path in rest} == {"kernel", "bias", "scale", "class_token", "mask_token"}
    for path in rest:
        # Two programs, which XLA need not round alike.
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-6, atol=1e-9, err_msg=str(path))
    assert np.abs(found[QKV] - expected[QKV]).max() > 1e-3


def test_the_singular_values_of_an_update_lie_near_1():
    for path, update in updates_of(muon_settings(weight_decay=0.0), schedule=lambda _: 1.0).items():
        if "blocks" in path and path[-1] == "kernel":
            for matrix in matrices(update):
                found = np.linalg.svd(matrix / (0.2 * np.sqrt(max(matrix.shape))), compute_uv=False)
                # The iteration takes all but tiny values into about [0.7, 1.2] (kellerjordan.github.io/posts/muon); a
                # random square matrix has some tiny ones.
                assert found.max() < 1.25 and np.median(found) > 0.65, path
                assert np.sqrt(np.mean(np.square(matrix))) == pytest.approx(0.2, rel=0.25), path


def test_each_block_and_each_of_queries_keys_and_values_is_orthogonalised_on_its_own():
    changed = {path: leaf.copy() for path, leaf in drawn(0).items()}
    changed[QKV][1, :, 2] *= np.random.default_rng(5).uniform(0.1, 10, (32, 32))  # the values' kernel of block 1
    before, after = updates_of(muon_settings())[QKV], updates_of(muon_settings(), gradients=lambda _: changed)[QKV]
    same = (before == after).all(axis=(1, 3))
    np.testing.assert_array_equal(same, [[True] * 3, [True, True, False], [True] * 3])


def test_updates_do_not_depend_on_the_size_of_the_gradient_and_grow_with_the_rate():
    small = {path: 1e-3 * leaf for path, leaf in drawn(0).items()}
    settings = muon_settings(weight_decay=0.0)
    first, second = (updates_of(settings, gradients=lambda _, g=g: g)[QKV] for g in (drawn(0), small))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-4 * np.abs(first).max())
    np.testing.assert_allclose(updates_of(settings, schedule=lambda _: 0.3)[QKV], 3 * first, rtol=1e-5)


def test_the_rate_of_the_schedule_and_of_each_layer_multiplies_the_update():
    params, _ = classifier_values()
    schedule = make_schedule(muon_settings(base_learning_rate=0.1), 256, 2, 8)
    gradients = {path: np.random.default_rng(1).normal(size=leaf.shape) for path, leaf in params.items()}

    def kernel_update(steps, **changes):
        settings = muon_settings(weight_decay=0.0, **changes)
        return updates_of(settings, steps, lambda _: gradients, schedule, params)[QKV]

    assert not kernel_update(1).any()  # the warm-up begins at 0
    full = kernel_update(3)
    np.testing.assert_allclose(2 * kernel_update(2), full, rtol=0, atol=1e-4 * np.abs(full).max())  # half the rate
    factors = np.array([0.125, 0.25, 0.5]).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(kernel_update(3, layer_decay=0.5), factors * full, rtol=1e-5)


def test_clipping_by_the_norm_comes_before_the_momentum():
    sizes = (100, 1)  # both steps' gradients are too long, one of them much more so
    norms = [np.sqrt(sum(np.sum(np.square(leaf)) for leaf in drawn(step).values())) for step in (0, 1)]

    def long(step):
        return {path: sizes[step] * leaf for path, leaf in drawn(step).items()}

    def cut(step):
        return {path: leaf / norms[step] for path, leaf in drawn(step).items()}

    found, expected = updates_of(muon_settings(clip_norm=1.0), 2, long), updates_of(muon_settings(), 2, cut)
    for path in (QKV, ("encoder", "norm", "scale")):
        np.testing.assert_allclose(found[path], expected[path], rtol=0, atol=1e-4 * np.abs(expected[path]).max())


# ------------------------------------------------------------------------------------------------- its state


def classifier_values(trained_blocks=None):
    """(trained, frozen) parameters of a classifier, by path."""
    classifier = ClassifierConfig(MODEL, 3, trained_blocks=trained_blocks)
    params = random_like(jax.eval_shape(lambda: init_classifier(classifier, jax.random.key(0))[0]))
    return tuple(flatten_dict(part) for part in split_classifier(classifier, params))


@pytest.mark.parametrize("trained_blocks", [None, 0.5, 2])
def test_matrices_have_one_moment_all_else_two_and_what_is_frozen_none(trained_blocks):
    trained, _ = classifier_values(trained_blocks)
    state = make_optimizer(muon_settings(), lambda _: 0.1).init(unflatten_dict(trained))
    total = count_parameters(trained)
    blocks = sum(leaf.size for path, leaf in trained.items() if "blocks" in path and path[-1] == "kernel")
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape != (3,)]  # but the coefficients
    small = sum(2 * leaf.size for leaf in trained.values() if leaf.shape == (3,))  # a bias of three classes
    assert sum(leaf.size for leaf in arrays) == 2 * total - blocks - small
    assert blocks > 0


def test_its_moments_are_split_as_the_parameters_they_are_of():
    params = unflatten_dict(values(0))
    state = make_optimizer(muon_settings(), lambda _: 0.1).init(params)
    expected = flatten_dict(parameter_specs(params))
    specs = jax.tree_util.tree_leaves_with_path(
        parameter_specs(state), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
    counted = 0
    for path, spec in specs:
        names = tuple(entry.key for entry in path if hasattr(entry, "key"))
        owner = next((names[i:] for i in range(len(names)) if names[i:] in expected), None)
        if owner is not None:
            counted += 1
            assert spec == expected[owner], owner
    assert counted == 2 * len(expected) - len(MATRICES) - 2  # Adam has two of each
    assert expected[QKV] == PartitionSpec(None, "fsdp", None, "tensor")


def test_clipping_layer_decay_and_momentum_can_change_in_the_middle_of_a_run():
    params = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))

    def state_of(**changes):
        return jax.eval_shape(make_optimizer(muon_settings(**changes), lambda _: 0.1).init, params)

    assert state_of() == state_of(clip_norm=1.0, layer_decay=0.5, weight_decay=0.0, muon_momentum=0.9)


@pytest.mark.parametrize("sizes", [(1, 8), (2, 2, 2)], ids=str)
def test_the_update_on_a_mesh_is_that_of_one_device_and_lies_as_the_parameters_do(sizes):
    mesh, optimizer = device_mesh(*sizes), make_optimizer(muon_settings(), lambda _: 0.1)
    params, gradients = (unflatten_dict(values(seed)) for seed in (0, 10))
    shardings = parameter_shardings(mesh, params)
    on_mesh = [put(tree, shardings) for tree in (params, gradients)]
    state = create(lambda _: optimizer.init(params), jax.random.key(0), mesh)
    moments = flatten_dict(state.inner_states["muon"].inner_state[0].mu)
    assert moments[QKV].sharding == flatten_dict(shardings)[QKV] and not moments[QKV].is_fully_replicated
    update = jax.jit(optimizer.update, out_shardings=(shardings, jax.tree.map(lambda leaf: leaf.sharding, state)))
    found = flatten_dict(update(on_mesh[1], state, on_mesh[0])[0])
    for path, expected in updates_of(muon_settings()).items():
        # float32, added up in another order; small singular values grow with their errors.
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=str(path))


@pytest.mark.slow
def test_a_training_step_on_all_axes_is_that_of_one_device():
    # The large epsilon keeps Adam from blowing up gradients that are nothing but rounding.
    make = lambda: make_optimizer(muon_settings(epsilon=1.0), lambda _: 1.0)  # noqa: E731
    (scalars, params, _), (expected, expected_params, _) = (
        one_step(sizes, make_optimizer=make) for sizes in ((2, 2, 2), (1,))
    )
    assert scalars["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert_close(params, expected_params, 1e-3)  # gradients differ by 1e-5 of their largest value
