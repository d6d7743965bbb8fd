"""What the compiled training step sends between devices, read from its program, and what theory says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from benchmarks.collectives import read_collectives
from configs.common import get_config
from mae_jax.models.mae import MAEConfig, init_params
from mae_jax.objectives.objective import Variables
from mae_jax.objectives.pretrain import make_loss_fn
from mae_jax.training.optimizers import make_optimizer, make_schedule
from mae_jax.training.plan import compile_train_step
from mae_jax.training.step import abstract_state, make_init, make_train_step
from tests.meshes import device_mesh

pytestmark = pytest.mark.slow
SIZES = dict(
    image_size=16, patch_size=4, channels=3, width=32, depth=2, num_heads=8,
    decoder_width=16, decoder_depth=2, decoder_num_heads=8,
)  # fmt: skip
BATCH = 32
NUMBERS = 64  # bytes; less than that are single numbers: the loss, the gradient's norm


@functools.cache
def model_config(remat=False):
    config = get_config()
    config.model.update(SIZES, remat=remat)
    return config, MAEConfig(**config.model)


@functools.cache
def sent(sizes, parts=1, remat=False):
    """The collectives of AdamW's step on a mesh: {(kind, axes): (executions, bytes)}, and the bytes of mere numbers."""
    (config, model), mesh = model_config(remat), device_mesh(*sizes)
    schedule = make_schedule(config.optimizer, BATCH, 1, 10)
    optimizer = make_optimizer(config.optimizer, schedule)
    init = make_init(lambda key: Variables(init_params(model, key)), optimizer)
    step_fn = make_train_step(make_loss_fn(config, model), optimizer, schedule, mesh, parts)
    images = {"image": jax.ShapeDtypeStruct((BATCH, 16, 16, 3), jnp.uint8)}
    compiled = compile_train_step(step_fn, abstract_state(init, mesh), images, jax.random.key(0), mesh)
    found, numbers = {}, 0
    for collective in read_collectives(compiled.as_text(), mesh.shape):
        assert collective.is_exact
        if collective.payload < NUMBERS:
            numbers += collective.bytes
            continue
        key = collective.kind, collective.axes
        times, total = found.get(key, (0, 0))
        found[key] = times + collective.executions, total + collective.bytes
    return found, numbers


def bytes_of(select):
    """Bytes of the parameters that `select(path)` chooses, in float32."""
    _, model = model_config()
    shapes = flatten_dict(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))
    return 4 * sum(int(np.prod(leaf.shape)) for path, leaf in shapes.items() if select(path))


EVERYTHING = bytes_of(lambda path: True)
KERNELS = bytes_of(lambda path: path[-1] == "kernel")
BLOCK_KERNELS = bytes_of(lambda path: path[-1] == "kernel" and "blocks" in path)
OTHER_KERNELS = KERNELS - BLOCK_KERNELS
COLUMN_BIASES = bytes_of(lambda path: path[-1] == "bias" and path[-2] in ("qkv", "fc1"))  # split over tensor
VECTORS = EVERYTHING - KERNELS


@pytest.mark.parametrize("parts", [1, 4])
def test_data_parallel_sums_each_gradient_once_a_step_and_sends_nothing_else(parts):
    found, numbers = sent((8,), parts)
    assert found.keys() == {("all-reduce", ("data",))}
    assert found["all-reduce", ("data",)][1] == pytest.approx(EVERYTHING, abs=NUMBERS)  # the loss may go with them
    assert numbers < NUMBERS


@pytest.mark.parametrize("parts, remat", [(1, False), (2, True)])
def test_fsdp_gathers_the_parameters_for_both_passes_and_scatters_their_gradients(parts, remat):
    found, numbers = sent((1, 8), parts, remat)
    assert found.keys() == {("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",)), ("all-reduce", ("fsdp",))}
    # The kernels outside the blocks stay from the forward to the backward pass, here for all parts.
    assert found["all-gather", ("fsdp",)][1] == parts * 2 * BLOCK_KERNELS + OTHER_KERNELS
    assert found["reduce-scatter", ("fsdp",)][1] == parts * KERNELS
    assert found["all-reduce", ("fsdp",)][1] == pytest.approx(VECTORS, abs=NUMBERS)
    assert numbers < 2 * NUMBERS


@pytest.mark.parametrize("remat", [False, True])
def test_tensor_parallel_sums_activations_twice_a_block_and_pass_and_of_gradients_those_of_norms(remat):
    found, numbers = sent((1, 1, 8), remat=remat)
    _, model = model_config()
    visible = 1 + model.num_visible()
    streams = [(model.depth, visible * model.width), (model.decoder_depth, 17 * model.decoder_width)]
    once = 4 * BATCH * sum(depth * values for depth, values in streams)
    # Scale and bias of a block's two norms are taken into kernels, of which each device has some columns.
    norms = 4 * 2 * 2 * (model.depth * model.width + model.decoder_depth * model.decoder_width)
    assert found.keys() == {("all-reduce", ("tensor",))}
    # Recomputing a block sums the attention's output again; nobody needs the MLP's.
    executions, total = found["all-reduce", ("tensor",)]
    assert executions == (5 if remat else 4) * (model.depth + model.decoder_depth)
    assert total == (5 if remat else 4) * once + norms
    assert numbers < 2 * NUMBERS


@pytest.mark.parametrize("parts", [2])
def test_together_the_data_axis_sums_once_a_step_what_is_left_on_a_device(parts):
    found, _ = sent((2, 2, 2), parts)
    kinds = {kind for kind, _ in found}
    assert kinds == {"all-gather", "reduce-scatter", "all-reduce"}  # no all-to-all, no permutation
    # A device's share of the blocks' kernels over tensor, gathered and scattered over fsdp for each part.
    blocks = BLOCK_KERNELS // 2
    assert found["all-gather", ("fsdp",)][1] == parts * 2 * blocks + OTHER_KERNELS
    assert found["reduce-scatter", ("fsdp",)][1] == parts * (blocks + OTHER_KERNELS)
    assert found["all-reduce", ("data",)][1] == pytest.approx((blocks + OTHER_KERNELS) // 2, abs=NUMBERS)
    vectors = VECTORS - COLUMN_BIASES // 2
    assert found["all-reduce", ("data", "fsdp")][1] == pytest.approx(vectors, abs=NUMBERS)


@pytest.mark.parametrize("sizes, parts", [((8,), 1), ((1, 8), 1), ((2, 2, 2), 2)])
def test_no_batch_is_gathered(sizes, parts):
    found, _ = sent(sizes, parts)
    largest_matrix = 4 * 4 * 32 * 32
    for (kind, axes), (executions, total) in found.items():
        if kind == "all-gather":
            assert axes == ("fsdp",) and total <= executions * largest_matrix
