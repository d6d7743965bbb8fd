"""Models on meshes of eight devices: what each holds, and that the numbers are those of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mae_jax.models.classifier import ClassifierConfig, init_classifier, make_bind_classifier, split_classifier
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.models.parameters import join
from mae_jax.objectives.objective import LossDetails, Variables
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import batch_sharding, check_heads, create, parameter_shardings, put, put_batch, replicated
from mae_jax.runtime.sharding import on_rows
from mae_jax.training.plan import compile_train_step
from mae_jax.training.step import abstract_state, make_init, make_train_step
from tests.meshes import device_mesh

# Eight heads in both halves, so that a device can have one; odd sizes where nothing is split.
MODEL = MAEConfig((8, 12), 4, 3, 32, 2, 8, 2.0, 16, 1, 8)
PROBE = ClassifierConfig(MODEL, 3, pool="attentive", trained_blocks=1, batch_norm=True)
MESHES = [(8,), (1, 8), (1, 1, 8), (2, 2, 2)]  # each axis alone, and all
BATCH = 32


def mae_trainee(config=MODEL):
    """(init, loss function, batch) of the autoencoder."""
    images = np.random.default_rng(0).normal(size=(BATCH, *config.image_size, 3)).astype(np.float32)

    def loss_fn(params, frozen, batch, keys):
        return make_bind(config)(params)(batch["image"], key=keys).loss, LossDetails()

    return lambda key: Variables(init_params(config, key)), loss_fn, {"image": images}


def probe_trainee():
    """The same of a classifier with BatchNorm, frozen blocks and an attentive pool."""
    images = np.random.default_rng(0).normal(size=(BATCH, *MODEL.image_size, 3)).astype(np.float32)
    labels = np.arange(BATCH, dtype=np.int32) % 3
    bind = make_bind_classifier(PROBE)

    def init(key):
        params, statistics = init_classifier(PROBE, key)
        return Variables(*split_classifier(PROBE, params), statistics)

    def loss_fn(params, frozen, batch, keys):
        unused = {"head": {"batch_norm": {"mean": jnp.zeros(32), "variance": jnp.ones(32)}}}
        classifier = bind(join(frozen, params, unused))
        logits, statistics = classifier.classify(classifier.represent(batch["image"], keys), training=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, LossDetails({"logit": logits.mean()}, statistics)

    return init, loss_fn, {"image": images, "label": labels}


@functools.cache
def one_step(sizes, parts=1, trainee=mae_trainee, dtype="float32", make_optimizer=lambda: optax.sgd(1.0)):
    """(loss and other scalars, the state after one step, of SGD with rate 1) on a mesh, fetched."""
    config = dataclasses.replace(MODEL, dtype=dtype)
    make_variables, loss_fn, batch = trainee(config) if trainee is mae_trainee else trainee()
    mesh, optimizer, key = device_mesh(*sizes), make_optimizer(), jax.random.key(1)
    init = make_init(make_variables, optimizer)
    step_fn = make_train_step(loss_fn, optimizer, lambda _: 1.0, mesh, parts)
    shapes = {name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in batch.items()}
    compiled = compile_train_step(step_fn, abstract_state(init, mesh), shapes, key, mesh)
    state = create(init, jax.random.key(0), mesh)
    state, scalars = compiled(state, put_batch(batch, batch_sharding(mesh)), key)
    return jax.device_get((scalars, state.params, state.statistics))


def assert_close(tree, expected, tolerance):
    for path, value in flatten_dict(expected).items():
        found = flatten_dict(tree)[path]
        assert np.abs(found - value).max() <= tolerance * max(np.abs(value).max(), 1e-2), path


@pytest.mark.parametrize("sizes, parts", [*((sizes, 1) for sizes in MESHES[:3]), ((2, 2, 2), 2)], ids=str)
def test_loss_and_every_gradient_of_the_autoencoder_are_those_of_one_device(sizes, parts):
    (scalars, params, _), (expected, expected_params, _) = one_step(sizes, parts), one_step((1,))
    # float32, added up in another order.
    assert scalars["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert scalars["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert_close(params, expected_params, 1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2)], ids=str)
def test_a_probe_with_frozen_blocks_and_batch_norm_is_the_same_on_every_mesh(sizes):
    found, expected = one_step(sizes, 1, probe_trainee), one_step((1,), 1, probe_trainee)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert found[0]["logit"] == pytest.approx(expected[0]["logit"], abs=1e-6)
    assert_close(found[1], expected[1], 1e-5)
    assert_close(found[2], expected[2], 1e-6)  # of the whole batch, over all devices


@pytest.mark.parametrize("sizes", [(2, 2, 2)], ids=str)
def test_gradients_of_bfloat16_products_are_summed_in_float32(sizes):
    (scalars, params, _), (expected, expected_params, _) = (one_step(s, dtype="bfloat16") for s in (sizes, (1,)))
    assert scalars["loss"] == pytest.approx(expected["loss"], rel=2e-3)  # products of bfloat16 have 8 bits
    assert jax.tree.leaves(params)[0].dtype == np.float32
    assert_close(params, expected_params, 2e-2)


@functools.cache
def whole_params():
    """The initial parameters on one device."""
    return create(functools.partial(init_params, MODEL), jax.random.key(0), device_mesh())


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_initial_parameters_are_the_same_bits_on_every_mesh_and_never_whole_on_a_device(sizes):
    mesh, key = device_mesh(*sizes), jax.random.key(0)
    params = create(functools.partial(init_params, MODEL), key, mesh)
    jax.tree.map(np.testing.assert_array_equal, params, whole_params())
    for path, leaf in flatten_dict(params).items():
        shares = {"kernel": mesh.shape["fsdp"]}.get(path[-1], 1)
        if "blocks" in path and (path[-1] == "kernel" or path[-2] in ("qkv", "fc1")):
            shares *= mesh.shape["tensor"]
        assert leaf.addressable_shards[0].data.size * shares == leaf.size, path


def test_parameters_and_optimizer_take_a_part_of_the_memory_as_large_as_fsdp_says():
    model = MAEConfig(16, 4, 3, 64, 4, 8, 4.0, 32, 2, 8)
    optimizer = optax.adamw(1e-3)
    init = make_init(lambda key: Variables(init_params(model, key)), optimizer, keep_average=True)

    def device_bytes(*sizes):
        shapes = abstract_state(init, device_mesh(*sizes))
        return sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(shapes)
        )

    whole = device_bytes(1)
    vectors = 0.02  # share of biases, norms and tokens, which stay whole: in ViT-B it is a thousandth
    for fsdp in (2, 4, 8):
        assert whole / fsdp <= device_bytes(1, fsdp) <= whole * (1 / fsdp + vectors)


@pytest.mark.parametrize("sizes", [(2, 2, 2)], ids=str)
def test_what_is_computed_for_each_row_is_the_same_on_every_mesh_and_whole_everywhere(sizes):
    mesh = device_mesh(*sizes)
    params = whole_params()
    images = np.random.default_rng(0).normal(size=(16, 8, 12, 3)).astype(np.float32)
    encode = on_rows(lambda params, batch: make_bind(MODEL)(params).encode(batch["image"]), mesh)
    laid_out = put(params, parameter_shardings(mesh, params))
    features = encode(laid_out, put_batch({"image": images}, batch_sharding(mesh)))
    assert features.is_fully_replicated
    expected = jax.jit(lambda params: make_bind(MODEL)(params).encode(images))(params)
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-6)
    few = jax.jit(lambda params, images: make_bind(MODEL)(params).encode(images), out_shardings=replicated(mesh))
    np.testing.assert_allclose(few(laid_out, images[:3]), expected[:3], rtol=0, atol=2e-6)


@pytest.mark.parametrize("sizes, setting", [((1, 1, 3), "mesh.tensor=3"), ((1, 5), "mesh.fsdp=5")], ids=str)
def test_a_mesh_that_does_not_divide_the_model_is_refused_by_name(sizes, setting):
    mesh = device_mesh(*sizes)
    with pytest.raises(UserError, match=setting):
        check_heads(mesh, MODEL)
        parameter_shardings(mesh, jax.eval_shape(functools.partial(init_params, MODEL), jax.random.key(0)))
