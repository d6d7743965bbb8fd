"""Devices: the mesh, and how arrays are laid out on it."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mae_jax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")
MOST_CPU_DEVICES = 4096  # that are emulated; each takes threads
BATCH_AXES = ("data", "fsdp")  # a batch's rows are split over both

# How parameters are laid out: the first pattern that ends a parameter's path (such as "encoder/blocks/mlp/fc1/kernel")
# decides. Matrices are split over fsdp; those of the blocks also over tensor: queries, keys, values and the first layer
# of an MLP by their columns (heads, hidden units), the layers that follow these by their rows. Vectors that every
# column needs stay whole, less than a part in a thousand. The axes are one block's: a stack has its depth before them.
PARAMETER_RULES = (
    (r"attention/qkv/kernel", PartitionSpec("fsdp", None, "tensor")),
    (r"attention/qkv/bias", PartitionSpec(None, "tensor")),
    (r"attention/q/kernel", PartitionSpec("fsdp", "tensor")),
    (r"attention/q/bias", PartitionSpec("tensor")),
    (r"attention/kv/kernel", PartitionSpec("fsdp", None, "tensor")),
    (r"attention/kv/bias", PartitionSpec(None, "tensor")),
    (r"attention/out/kernel", PartitionSpec("tensor", "fsdp")),
    (r"mlp/fc1/kernel", PartitionSpec("fsdp", "tensor")),
    (r"mlp/fc1/bias", PartitionSpec("tensor")),
    (r"mlp/fc2/kernel", PartitionSpec("tensor", "fsdp")),
    (r"(patch_embed|decoder/embed)/kernel", PartitionSpec(None, "fsdp")),
    (r"(predict|linear|pool/key|pool/value)/kernel", PartitionSpec("fsdp", None)),
    (r"positions", PartitionSpec(None, "fsdp")),
    (r"", PartitionSpec()),
)


def prepare_cpu(settings: ConfigDict) -> None:
    """Says how a CPU computes, and as how many devices it counts, whatever its cores; must come before JAX starts.

    What one device of a CPU computes is computed while the caller waits, in its thread, which keeps the memory that a
    step frees for the next one (`keep_freed_memory`); no second step takes as much beside it. The environment decides
    where it has a number of devices (JAX_NUM_CPU_DEVICES, or XLA_FLAGS with `--xla_force_host_platform_device_count`).

    Args:
      settings: the group `mesh`.

    Raises:
      UserError: for a number of devices that cannot be, or with JAX_ENABLE_X64.
    """
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 is on, but mae_jax computes with at most 32 bits; unset it")
    count = settings.cpu_devices
    check_cpu_devices("mesh.cpu_devices=", count)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    given = jax.config.jax_num_cpu_devices
    if given > 0:
        check_cpu_devices("JAX_NUM_CPU_DEVICES=", given)
    decided = given > 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count > 1 and not decided:
        jax.config.update("jax_num_cpu_devices", count)


def check_cpu_devices(name: str, count: int | None) -> None:
    """Raises UserError unless a CPU can count as so many devices; `name` is what the number is given as."""
    if count is None or not 1 <= count <= MOST_CPU_DEVICES:
        raise UserError(f"{name}{count} must be 1 ... {MOST_CPU_DEVICES}: each of them takes threads and memory")


def all_devices() -> list[jax.Device]:
    """The devices of all processes, in the order of these, so that each one's rows of a batch lie side by side.

    Raises:
      UserError: if JAX_PLATFORMS names what is not here.
    """
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.jax_platforms
        if platforms in (None, "", "cpu"):
            raise
        why = str(error).split(" (set JAX_PLATFORMS")[0].rstrip(".") or "no such device is found"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: {why}; unset it to take the devices that are here, or give JAX_PLATFORMS=cpu"
        ) from error
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def fitting_dtype(device: jax.Device, wanted: str | None = None) -> str:
    """The type of matrix products where the user leaves it open: what is wanted (None: bfloat16), if the chip has it.

    TPUs multiply in bfloat16, and GPUs do (NVIDIA's from compute capability 8.0 on); of CPUs few do, and others only
    imitate it, slower than float32.

    Args:
      wanted: such as that of the checkpoint that is measured.
    """
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are names
    early = re.fullmatch(r"[0-7]\.\d+", capability)
    has_bfloat16 = device.platform != "cpu" and not early
    return wanted or "bfloat16" if has_bfloat16 else "float32"


def settle_dtype(config: ConfigDict, mesh: Mesh, earlier: dict[str, Any] | None = None) -> None:
    """Sets `model.dtype` if it is open; a run that goes on keeps that of its earlier config, if the chip has it."""
    if config.model.dtype is None:
        config.model.dtype = fitting_dtype(mesh.devices.flat[0], earlier and earlier["model"].get("dtype"))


def make_mesh(settings: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh with axes data, fsdp and tensor; at most one of the sizes may be -1: what is left.

    Args:
      settings: the group `mesh`.
      devices: None: all of all processes.

    Raises:
      UserError: if the sizes do not fit the number of devices.
    """
    devices = all_devices() if devices is None else devices
    sizes = [settings[axis] for axis in AXES]
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{text}: sizes are at least 1, and one of them may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(
            f"{text}: their product is not the number of devices, {len(devices)}; let mesh.fsdp x mesh.tensor divide "
            "it, and mesh.data=-1 take the rest"
        )
    # In this order, the devices of the tensor axis are the closest, as its many messages need. (`jax.make_mesh` would
    # follow a TPU's torus instead, and tear the rows of a process apart.)
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading (batch) axis split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Number of parts that a batch is split into; batch sizes must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process's devices hold the index-th of `count` equal shares of a batch's rows.

    Processes whose devices differ in the tensor axis alone have the same share.

    Raises:
      UserError: if the rows of a process's devices do not lie side by side.
    """
    parts = batch_parts(mesh)
    found = batch_sharding(mesh).addressable_devices_indices_map((parts,)).values()
    mine = sorted({rows[0].indices(parts)[0] for rows in found})
    first, size = mine[0], len(mine)
    if mine != list(range(first, first + size)) or first % size or parts % size:
        raise UserError(
            f"mesh.data={mesh.shape['data']}, mesh.fsdp={mesh.shape['fsdp']}: process {jax.process_index()} would hold "
            f"parts {mine} of each batch, which are not adjacent; let mesh.fsdp x mesh.tensor be a multiple or "
            "a divisor of the devices of a process"
        )
    return first // size, parts // size


def parameter_spec(path: tuple, ndim: int) -> PartitionSpec:
    """How an array with this path in a tree of parameters, or one that mirrors it, is split over the mesh."""
    name = "/".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)
    spec = next(spec for pattern, spec in PARAMETER_RULES if re.search(f"({pattern})$", name))
    return PartitionSpec(*(None,) * (ndim - len(spec)), *spec) if len(spec) <= ndim else PartitionSpec()


def parameter_specs(tree):
    """`parameter_spec` of every array (or abstract array) of a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: parameter_spec(path, leaf.ndim), tree)


def parameter_shardings(mesh: Mesh, tree):
    """The layout of every array of a tree of parameters, or of one that mirrors it such as the optimizer's state.

    Raises:
      UserError: if the mesh does not divide an array.
    """

    def sharding(path, leaf):
        found = NamedSharding(mesh, parameter_spec(path, leaf.ndim))
        try:
            found.shard_shape(tuple(leaf.shape))
        except ValueError as error:
            raise UserError(
                f"mesh.fsdp={mesh.shape['fsdp']}, mesh.tensor={mesh.shape['tensor']} cannot split the parameter "
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} {list(leaf.shape)}; choose divisors of the "
                "widths"
            ) from error
        return found

    return jax.tree_util.tree_map_with_path(sharding, tree)


def check_heads(mesh: Mesh, model: Any, *, decoder: bool = True) -> None:
    """Raises UserError unless the tensor axis splits the heads of a model (MAEConfig), or its encoder's, evenly."""
    size = mesh.shape["tensor"]
    for name in ("num_heads", "decoder_num_heads") if decoder else ("num_heads",):
        if getattr(model, name) % size:
            raise UserError(
                f"mesh.tensor={size} does not divide model.{name}={getattr(model, name)}: each device takes whole heads"
            )


def create(init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh):
    """init(key), a tree of parameters or one that mirrors it, every part created on the device where it will live."""
    layout = parameter_shardings(mesh, jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=layout, compiler_options=compiler_options(mesh))(key)


def compiler_options(mesh: Mesh) -> dict[str, int] | None:
    """What programs are compiled with, unless XLA_FLAGS has its own: on a CPU, with little optimisation.

    With JAX 0.10 the initial values of the digits compile in 4.1 s of processor time instead of 10.3, their step in
    12.2 and 13.4 instead of 15.9 and 15.5; the values have the same bits, and steps are as fast
    (docs/performance.md). With no optimisation at all they are not.
    """
    option = "xla_backend_optimization_level"
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return {option: 1} if on_cpu and option not in os.environ.get("XLA_FLAGS", "") else None


def put_batch(batch: dict, sharding: NamedSharding) -> dict:
    """Sends this process's rows of a batch to its devices: a dict of global arrays, which may still be on their way."""
    with jax.transfer_guard("allow"):  # this is where it is meant
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def put(values, shardings):
    """Sends a tree of host arrays, the same in every process, to the devices: each gets its own part and no more.

    Args:
      shardings: a tree of the same structure, or one layout for all.
    """

    def send(value, sharding):
        value = np.asarray(value)
        with jax.transfer_guard("allow"):  # this is where it is meant
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda value: send(value, shardings), values)
    return jax.tree.map(send, values, shardings)


def whole(arrays):
    """A tree of global arrays that every process can fetch: unchanged, or a copy on every device if it cannot so."""
    leaves = jax.tree.leaves(arrays)
    if all(isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
        return arrays
    return _copy_everywhere(leaves[0].sharding.mesh)(arrays)


@functools.lru_cache(maxsize=4)
def _copy_everywhere(mesh: Mesh):
    return jax.jit(lambda arrays: arrays, out_shardings=replicated(mesh))
