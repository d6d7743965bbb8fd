"""Models on a mesh: each device runs the model on its rows of a batch, with its shard of the parameters.

`on_shards` is `jax.shard_map`. Inside it, JAX tracks the mesh axes over which each array varies, and sums gradients
accordingly. All other communication is in the functions below:

- fsdp (ZeRO-3, Rajbhandari et al. 2019, arXiv 1910.02054): a block's matrices are gathered when the block runs, forward
  and backward; gradients are reduce-scattered at once.
- tensor (Megatron, Shoeybi et al. 2019, arXiv 1909.08053, section 3): each device has some heads and hidden units;
  activations are summed once after each attention and MLP, their gradients once before.

We tried to leave this to the compiler: `jax.jit` with NamedSharding, constraints on each block's parameters,
activations, queries, keys and values. Bytes that a device sends in a ring / in theory, for the step of
`benchmarks.communication` (jax 0.10.2, 2026-11-28; parts: train.accumulate_steps):

    data x fsdp x tensor   parts   this module: CPU, v5p   jit: CPU, v5p
    8 x 1 x 1                1            1.00  1.00         1.00  1.00
    8 x 1 x 1                4            1.00  1.00         3.99  3.91
    1 x 8 x 1                1            1.00  1.22         1.33  1.22
    1 x 8 x 1                4            1.00  1.22         1.34  1.24
    2 x 2 x 2                1            1.00  1.00         1.12  1.08
    2 x 2 x 2                4            1.00  1.00         1.43  1.36

The compiler sums gradients over data once for each part of a batch, and sums full matrices where a device keeps only a
shard. (On v5p XLA gathers bfloat16 and, for so small a model, replaces reduce-scatters by all-reduces.)
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from mae_jax.runtime.mesh import BATCH_AXES, parameter_spec, parameter_specs, replicated

ROWS = PartitionSpec(BATCH_AXES)


def on_shards(fn: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
    """Runs fn on every device with its parts of the arguments (`jax.shard_map`); on one device, fn itself."""
    if mesh.size == 1:
        return fn

    def keep(entry):  # axes of more than one device
        axes = entry if isinstance(entry, tuple) else (entry,)
        return tuple(axis for axis in axes if axis and mesh.shape[axis] > 1) or None

    def local(*arguments):
        # They vary, so that gradients are not summed over the batch's devices: the step does that later.
        return fn(*jax.tree.map(lambda x: vary(x, axes_of(BATCH_AXES)), arguments))

    in_specs, out_specs = jax.tree.map(lambda spec: PartitionSpec(*map(keep, spec)), (in_specs, out_specs))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def on_rows(fn: Callable, mesh: Mesh) -> Callable:
    """Compiles fn(variables, *rows) -> replicated rows, each treated alone; rows are trees [b, ...]."""

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    def run(variables, *batches):
        specs = parameter_specs(variables), *(ROWS,) * len(batches)
        return on_shards(fn, mesh, specs, ROWS)(variables, *batches)

    return run


def varying(x: jax.Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """The axes along which x varies; none outside `on_shards`."""
    kind = (x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)).manual_axis_type
    return kind.varying if kind else frozenset()


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    missing = tuple(axis for axis in axes if axis not in varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def axes_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those axes that have more than one device here; none outside `on_shards`."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name in names if name in mesh.manual_axes and mesh.shape[name] > 1)


def gather(parameters, dtype: jnp.dtype | None = None):
    """Gathers the parameters that are split over fsdp (see `PARAMETER_RULES`), in `dtype` (None: unchanged)."""
    if not axes_of(("fsdp",)):
        return parameters

    def gather_one(path, leaf):
        spec, kind = parameter_spec(path, leaf.ndim), dtype or leaf.dtype
        if "fsdp" not in spec:
            return leaf
        whole = functools.partial(jax.lax.all_gather, axis_name="fsdp", axis=spec.index("fsdp"), tiled=True)

        @jax.custom_jvp
        def gathered(leaf):
            return whole(leaf.astype(kind))

        @gathered.defjvp
        def tangent(primals, tangents):
            # Transposed, this reduce-scatters gradients in float32, the dtype of the parameters.
            return whole(primals[0].astype(kind)), whole(tangents[0]).astype(kind)

        return gathered(leaf)

    return jax.tree_util.tree_map_with_path(gather_one, parameters)


def checkpoint_policy() -> Callable | None:
    """The `jax.checkpoint` policy that saves no gathered parameters and no views of them, if there are any."""
    if not axes_of(("fsdp",)):
        return None
    return lambda primitive, *_, **__: primitive.name not in ("all_gather", "reshape", "transpose")


def sum_of_parts(product: jax.Array, x: jax.Array) -> jax.Array:
    """Sums a product with x over the tensor axis if x's features are split over it."""
    return jax.lax.psum(product, "tensor") if "tensor" in varying(x) else product


def mean_over_batch(tree):
    """Averages each device's means over the devices of a batch; values that do not vary stay unchanged."""

    def mean(x):
        axes = tuple(axis for axis in BATCH_AXES if axis in varying(x))
        return jax.lax.pmean(x, axes) if axes else x

    return jax.tree.map(mean, tree)


def all_rows(x: jax.Array) -> jax.Array:
    """Gathers a batch's rows [b, ...] from all devices, in order."""
    axes = axes_of(BATCH_AXES)
    return jax.lax.all_gather(x, axes, axis=0, tiled=True) if axes else x


def batch_devices() -> int:
    """Number of parts that a batch is split into; 1 outside `on_shards`."""
    return jax.lax.axis_size(axes_of(BATCH_AXES)) if axes_of(BATCH_AXES) else 1
