import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.common import get_config
from mae_jax.models.classifier import ClassifierConfig, init_classifier, make_bind_classifier, split_classifier
from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import block_flops
from mae_jax.models.parameters import count_parameters, join
from mae_jax.models.positions import resize_positions
from mae_jax.training.optimizers import make_optimizer
from tests.reference import leaves_by_block, max_relative, random_batch, random_like

ENCODER = MAEConfig(8, 4, 1, 16, 4, 2, 2.0, 12, 1, 3, scan_unroll=4)
CONFIG = ClassifierConfig(ENCODER, 3, pool="class")
CHOICES = (None, 0, 0.5, 1, 2, 3, 4)


@functools.cache
def random_params() -> dict:
    return random_like(jax.eval_shape(lambda: init_classifier(CONFIG, jax.random.key(0))[0]))


def names(tree: dict) -> dict[str, int]:
    """Number of rows of each array of a tree, by name."""
    return {"/".join(e.key for e in path): len(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# ------------------------------------------------------------------------------------------------- what trains


@pytest.mark.parametrize("trained_blocks", CHOICES)
@pytest.mark.parametrize("as_arrays", [np.asarray, jnp.asarray])
def test_join_puts_together_what_was_split(trained_blocks, as_arrays):
    params = jax.tree.map(as_arrays, random_params())
    config = dataclasses.replace(CONFIG, trained_blocks=trained_blocks)
    trained, frozen = split_classifier(config, params)
    assert count_parameters(trained) + count_parameters(frozen) == count_parameters(params)
    joined = join(frozen, trained)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    for found, expected in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True):
        assert type(found) is type(expected)
        np.testing.assert_array_equal(found, expected)


HEAD = {"head/linear/kernel": 16, "head/linear/bias": 3}
NORM = {"encoder/norm/scale": 16, "encoder/norm/bias": 16}
MLP = {f"encoder/blocks/{name}" for name in ("norm2/scale", "norm2/bias", "mlp/fc1/kernel", "mlp/fc1/bias",
                                             "mlp/fc2/kernel", "mlp/fc2/bias")}  # fmt: skip
ATTENTION = {f"encoder/blocks/{name}" for name in ("norm1/scale", "norm1/bias", "attention/qkv/kernel",
                                                   "attention/qkv/bias", "attention/out/kernel",
                                                   "attention/out/bias")}  # fmt: skip


@pytest.mark.parametrize(
    ("trained_blocks", "pool", "expected"),
    [
        (0, "class", HEAD),
        (0, "mean", HEAD),
        (0, "mean_norm", HEAD | NORM),  # there the norm follows the pool and belongs to the head
        (0.5, "class", HEAD | NORM | dict.fromkeys(MLP, 1)),
        (1, "class", HEAD | NORM | dict.fromkeys(MLP | ATTENTION, 1)),
        (2, "mean_norm", HEAD | NORM | dict.fromkeys(MLP | ATTENTION, 2)),
        (4, "class", HEAD | NORM | dict.fromkeys(MLP | ATTENTION, 4)),  # but no embeddings
    ],
)
def test_the_head_and_the_last_blocks_train_and_nothing_else(trained_blocks, pool, expected):
    config = dataclasses.replace(CONFIG, trained_blocks=trained_blocks, pool=pool)
    trained, frozen = split_classifier(config, random_params())
    assert names(trained) == expected
    everything = names(random_params())
    assert names(frozen) == {
        name: rows - expected.get(name, 0)
        for name, rows in everything.items()
        if name not in expected or expected[name] < rows
    }
    for name, leaf in leaves_by_block(trained).items():
        if "blocks" in name:  # the last rows, not the first
            first = 4 - int(np.ceil(trained_blocks))
            _, _, block, *rest = name.split("/")
            of_all = leaves_by_block(random_params())["/".join(["encoder/blocks", str(int(block) + first), *rest])]
            np.testing.assert_array_equal(leaf, of_all)


def test_everything_trains_if_no_number_of_blocks_is_given():
    trained, frozen = split_classifier(CONFIG, random_params())
    assert names(trained) == names(random_params()) and frozen == {}


# ------------------------------------------------------------------------------------------------- gradients


@functools.cache
def gradients(trained_blocks: float | None, remat: bool = False) -> tuple[dict, dict]:
    """(gradient of the trained parameters, the rows of the frozen ones) of a cross-entropy."""
    encoder = dataclasses.replace(ENCODER, remat=remat, scan_unroll=1)
    config = dataclasses.replace(CONFIG, encoder=encoder, trained_blocks=trained_blocks)
    bind, (images, _) = make_bind_classifier(config), random_batch(ENCODER, 3)

    def loss(trained, frozen):
        logits = bind(join(frozen, trained))(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(3)).mean()

    trained, frozen = split_classifier(config, jax.tree.map(jnp.asarray, random_params()))
    return jax.jit(jax.grad(loss))(trained, frozen), frozen


@pytest.mark.parametrize(
    ("trained_blocks", "remat"), [(0, False), (0.5, False), (1, False), (2, False), (4, False), (1, True), (3, True)]
)
def test_the_gradient_of_what_trains_is_that_part_of_the_whole_gradient(trained_blocks, remat):
    (found, _), (everything, _) = gradients(trained_blocks, remat), gradients(None)
    config = dataclasses.replace(CONFIG, trained_blocks=trained_blocks)
    expected, _ = split_classifier(config, everything)
    assert names(found) == names(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(b)) > 0
        # The same sums, compiled in another way: a few roundings of float32.
        assert max_relative(a, b) < 1e-5, jax.tree_util.keystr(path)


@functools.cache
def step_flops(trained_blocks: float | None) -> float:
    """Operations that XLA counts in the gradient of one image, blocks unrolled (it counts a loop's body once)."""
    encoder = MAEConfig(64, 8, 3, 128, 4, 4, 4.0, 12, 1, 3, scan_unroll=4)
    config = ClassifierConfig(encoder, 3, pool="class", trained_blocks=trained_blocks)
    bind = make_bind_classifier(config)

    def loss(trained, frozen, images):
        return jnp.sum(bind(join(frozen, trained))(images) ** 2)

    shapes = jax.eval_shape(lambda: init_classifier(config, jax.random.key(0))[0])
    trained, frozen = jax.eval_shape(lambda params: split_classifier(config, params), shapes)
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(trained, frozen, images).compile().cost_analysis()["flops"] / 8


def test_frozen_blocks_cost_no_backward_pass():
    block = block_flops(65, 128, 512)
    embed = 2 * 64 * 192 * 128
    # Norms, softmax and GELU, which the formula leaves out, are 3 to 6 percent of blocks this narrow; the backward pass
    # of one more block would be 33 percent or more. The first layer that trains passes no gradient on.
    qkv, fc1 = 2 * 65 * 128 * 3 * 128, 2 * 65 * 128 * 512
    assert step_flops(0) == pytest.approx(embed + 4 * block, rel=0.1)
    assert step_flops(0.5) - step_flops(0) == pytest.approx(2 * 2 * fc1 - fc1, rel=0.1)
    assert step_flops(1) - step_flops(0) == pytest.approx(2 * block - qkv, rel=0.1)
    assert step_flops(3) - step_flops(0) == pytest.approx(3 * 2 * block - qkv, rel=0.1)
    assert step_flops(None) - step_flops(0) == pytest.approx(4 * 2 * block + embed, rel=0.1)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_the_optimizer_keeps_nothing_for_frozen_parameters(name):
    trained, frozen = split_classifier(dataclasses.replace(CONFIG, trained_blocks=1), random_params())
    settings = get_config().optimizer
    settings.name = name
    state = make_optimizer(settings, lambda _: 0.1).init(trained)
    moments = 2 if name == "adamw" else 1
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == moments * count_parameters(trained)
    assert count_parameters(frozen) > count_parameters(trained)


# ------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (7, 7)), ((14, 14), (5, 5)), ((3, 5), (6, 4)), ((2, 8), (2, 3)), ((1, 1), (3, 2))]
)
def test_resized_positions_are_those_of_pytorchs_bicubic_interpolation(old, new):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).standard_normal((1 + old[0] * old[1], 12)).astype(np.float32)
    pictures = torch.tensor(table[1:].reshape(*old, 12).transpose(2, 0, 1))[None]
    resized = torch.nn.functional.interpolate(pictures, size=new, mode="bicubic", align_corners=False)
    expected = resized[0].numpy().transpose(1, 2, 0).reshape(-1, 12)
    found = resize_positions(table, old, new)
    assert found.shape == (1 + new[0] * new[1], 12) and found.dtype == np.float32
    assert max_relative(found[1:], expected) < 1e-5
    np.testing.assert_array_equal(found[0], table[0])


def test_positions_for_the_same_grid_stay_as_they_are():
    table = np.random.default_rng(0).standard_normal((1 + 12, 8)).astype(np.float32)
    np.testing.assert_array_equal(resize_positions(table, (3, 4), (3, 4)), table)
