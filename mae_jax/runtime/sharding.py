"""Models on a mesh: each device runs the model on its rows of a batch, with its share of the parameters.

`on_shards` starts such a run. Inside it the functions below put the parts together where a model needs the whole;
elsewhere, and where an axis has one device, they do nothing. What they send is all that is sent:

- fsdp (ZeRO-3, Rajbhandari et al. 2019, arXiv 1910.02054): a block's matrices are gathered when the block is at work,
  forward and backward; the gradient of each is summed and scattered at once.
- tensor (Shoeybi et al. 2019, arXiv 1909.08053, section 3): a device has some of the heads and of the hidden units;
  activations are summed once after each attention and each MLP, their gradients once before.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mae_jax.runtime.mesh import BATCH_AXES, parameter_spec, parameter_specs, replicated

ROWS = PartitionSpec(BATCH_AXES)


def on_shards(fn: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
    """A function that every device runs on its parts of the arguments, cut as the specs say; `jax.jit` compiles it."""
    if mesh.size == 1:
        return fn
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def on_rows(fn: Callable, mesh: Mesh, *, shared: bool = False) -> Callable:
    """Compiles fn(variables, *rows) -> rows, a function of each example of a batch, for a mesh.

    Args:
      fn: takes and returns trees of arrays with a leading axis [b], and a model's variables.
      shared: each device works on all rows, which may then be any number, and not on its own.

    Returns:
      (variables laid out by `parameter_shardings`, rows over the batch's axes) -> rows, whole on every device.
    """
    rows = PartitionSpec() if shared else ROWS

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def run(variables, *batches):
        specs = parameter_specs(variables), *(rows for _ in batches)
        return on_shards(fn, mesh, specs, rows)(variables, *batches)

    return run


def splits(axis: str) -> bool:
    """Whether this code runs on shards, and more than one of them along an axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return axis in mesh.manual_axes and mesh.shape[axis] > 1


def axes_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of some axes that split."""
    return tuple(name for name in names if splits(name))


def gather(parameters, dtype: jnp.dtype | None = None):
    """The parameters with those whole that are split over fsdp; the gradient of each goes back to its parts.

    Args:
      parameters: a tree with the names of `PARAMETER_RULES`.
      dtype: that the gathered ones are sent and given in; None: their own. Their gradients are summed in float32.
    """
    if not splits("fsdp"):
        return parameters

    def gather_one(path, leaf):
        spec = parameter_spec(path, leaf.ndim)
        return _gather(leaf, spec.index("fsdp"), dtype or leaf.dtype) if "fsdp" in spec else leaf

    return jax.tree_util.tree_map_with_path(gather_one, parameters)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf, axis, dtype):
    return jax.lax.all_gather(leaf.astype(dtype), "fsdp", axis=axis, tiled=True)


def _gather_forward(leaf, axis, dtype):
    return _gather(leaf, axis, dtype), None


def _gather_backward(axis, dtype, _, gradient):
    # Parameters are float32, and so are the sums of their gradients.
    return (jax.lax.psum_scatter(gradient.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True),)


_gather.defvjp(_gather_forward, _gather_backward)


def gathers_again(primitive, *_, **__) -> bool:
    """The policy of `jax.checkpoint` that keeps all values for the backward pass but gathered parameters.

    A gathering is a function with a gradient of its own, and what a matrix product takes is a view of its result.
    """
    return primitive.name not in ("custom_vjp_call", "reshape")


def to_columns(x: jax.Array) -> jax.Array:
    """What the columns of a matrix that is split over tensor multiply: x; its gradient is the sum of theirs."""
    return _to_columns(x) if splits("tensor") else x


@jax.custom_vjp
def _to_columns(x):
    return x


_to_columns.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.psum(gradient, "tensor"),))


def from_rows(x: jax.Array) -> jax.Array:
    """The product with a matrix that is split by rows over tensor: the sum of the parts' products."""
    return _from_rows(x) if splits("tensor") else x


@jax.custom_vjp
def _from_rows(x):
    return jax.lax.psum(x, "tensor")


_from_rows.defvjp(lambda x: (_from_rows(x), None), lambda _, gradient: (gradient,))


def batch_devices() -> int:
    """Number of parts that a batch's rows are split into."""
    return math.prod(jax.lax.axis_size(axis) for axis in axes_of(BATCH_AXES))


def mean_over_batch(x: jax.Array) -> jax.Array:
    """The mean over the devices that hold a batch's rows, of values that are means over equally many rows."""
    axes = axes_of(BATCH_AXES)
    return jax.lax.pmean(x, axes) if axes else x


def all_rows(x: jax.Array) -> jax.Array:
    """A batch's rows [b, ...] of all devices, in their order."""
    axes = axes_of(BATCH_AXES)
    return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x
