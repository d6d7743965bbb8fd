"""The device mesh, and the layout of arrays on it."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mae_jax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")
MOST_CPU_DEVICES = 4096  # emulated ones; each takes threads
BATCH_AXES = ("data", "fsdp")  # a batch's rows are split over both

# Layout of parameters: the first pattern that matches the end of a path (such as "encoder/blocks/mlp/fc1/kernel") wins.
# Matrices are split over fsdp. Those of blocks are also split over tensor: q, k, v and fc1 by columns (heads, hidden
# units), the layers after them by rows. Other vectors are replicated; they are less than a thousandth of all values.
# Specs are for one block: in a stack, the depth axis comes first.
PARAMETER_RULES = (
    (r"attention/(qkv|kv)/kernel", PartitionSpec("fsdp", None, "tensor")),
    (r"attention/(qkv|kv)/bias", PartitionSpec(None, "tensor")),
    (r"(attention/q|mlp/fc1)/kernel", PartitionSpec("fsdp", "tensor")),
    (r"(attention/q|mlp/fc1)/bias", PartitionSpec("tensor")),
    (r"(attention/out|mlp/fc2)/kernel", PartitionSpec("tensor", "fsdp")),
    (r"(patch_embed/kernel|decoder/embed/kernel|positions)", PartitionSpec(None, "fsdp")),
    (r"(predict|linear|pool/key|pool/value)/kernel", PartitionSpec("fsdp", None)),
    (r"", PartitionSpec()),
)


def prepare_cpu(settings: ConfigDict) -> None:
    """Sets synchronous dispatch and the number of emulated devices on a CPU (settings `mesh.*`), before JAX starts.

    Steps then run one at a time in the caller's thread, which keeps freed memory (`keep_freed_memory`).
    JAX_NUM_CPU_DEVICES or `--xla_force_host_platform_device_count` in XLA_FLAGS overrides `mesh.cpu_devices`.
    """
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 is on, but mae_jax computes with at most 32 bits; unset it")
    count, given = settings.cpu_devices, jax.config.jax_num_cpu_devices
    check_cpu_devices("mesh.cpu_devices=", count)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if given > 0:
        check_cpu_devices("JAX_NUM_CPU_DEVICES=", given)
    elif count > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def check_cpu_devices(name: str, count: int | None) -> None:
    """Raises UserError unless a CPU can emulate `count` devices; `name` says where the number comes from."""
    if count is None or not 1 <= count <= MOST_CPU_DEVICES:
        raise UserError(f"{name}{count} must be 1 ... {MOST_CPU_DEVICES}: each of them takes threads and memory")


def all_devices() -> list[jax.Device]:
    """All devices, ordered by process for adjacent rows of a batch; UserError if JAX_PLATFORMS names a missing one."""
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
    """`wanted` (None: bfloat16) if the chip is fast in bfloat16, as TPUs and new GPUs are, else float32."""
    early = re.fullmatch(r"[0-7]\.\d+", str(getattr(device, "compute_capability", "")))  # NVIDIA's; AMD's are names
    return "float32" if device.platform == "cpu" or early else wanted or "bfloat16"


def fitting_attention(device: jax.Device, dtype: str, wanted: str | None = None) -> str:
    """`wanted` (None: the kernel that keeps no weights on NVIDIA's chips with bfloat16); UserError if it cannot run."""
    able = re.fullmatch(r"([89]|\d\d+)\.\d+", str(getattr(device, "compute_capability", "")))  # AMD's are names
    if wanted in ("pallas", "cudnn") and not able:
        needs = "needs an NVIDIA GPU of compute capability 8.0 or more"
        raise UserError(f"model.attention={wanted} {needs}, but this is {device.device_kind}: leave it out")
    return wanted or ("pallas" if able and dtype == "bfloat16" else "xla")


def fit_to_chip(model: ConfigDict | dict, device: jax.Device, earlier: Mapping | None = None) -> None:
    """Sets the settings `model.dtype` and `model.attention` if they are None.

    A checkpoint's `earlier` settings decide the dtype if the chip supports it.
    """
    if model.get("dtype") is None:
        model["dtype"] = fitting_dtype(device, earlier and earlier.get("dtype"))
    model["attention"] = fitting_attention(device, model["dtype"], model.get("attention"))


def make_mesh(settings: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of settings `mesh.*` (-1: what is left), over all devices by default."""
    devices = all_devices() if devices is None else devices
    sizes = [settings[axis] for axis in AXES]
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"{text}: sizes are at least 1, one may be -1, and their product is the number of devices, {len(devices)}; "
            "let mesh.fsdp x mesh.tensor divide it, and mesh.data=-1 take the rest"
        )
    # The tensor axis, which sends the most messages, gets the closest devices. (`jax.make_mesh` would follow a
    # TPU's torus, and a process's rows would not be adjacent.)
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading (batch) axis split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_parts(mesh: Mesh) -> int:
    """Number of parts that a batch is split into; batch sizes must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process holds the index-th of `count` equal, adjacent shares of a batch's rows."""
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
    """How the array at this path in a parameter tree, or in one that mirrors it, is split over the mesh."""
    name = "/".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)
    spec = next(spec for pattern, spec in PARAMETER_RULES if re.search(f"({pattern})$", name))
    return PartitionSpec(*(None,) * (ndim - len(spec)), *spec) if len(spec) <= ndim else PartitionSpec()


def parameter_specs(tree):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: parameter_spec(path, leaf.ndim), tree)


def parameter_shardings(mesh: Mesh, tree):
    """The layout of a tree of parameters, or one that mirrors it; UserError if the mesh does not divide an array."""

    def sharding(path, leaf):
        found = NamedSharding(mesh, parameter_spec(path, leaf.ndim))
        try:
            found.shard_shape(tuple(leaf.shape))
        except ValueError as error:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"mesh.fsdp={mesh.shape['fsdp']}, mesh.tensor={mesh.shape['tensor']} cannot split the parameter "
                f"{name} {list(leaf.shape)}; choose divisors of the widths"
            ) from error
        return found

    return jax.tree_util.tree_map_with_path(sharding, tree)


def check_heads(mesh: Mesh, model: Any, *, decoder: bool = True) -> None:
    """Raises UserError unless the tensor axis divides the heads of a model (MAEConfig), or of its encoder alone."""
    size = mesh.shape["tensor"]
    for name in ("num_heads", "decoder_num_heads") if decoder else ("num_heads",):
        if (heads := getattr(model, name)) % size:
            raise UserError(f"mesh.tensor={size} does not divide model.{name}={heads}: a device has whole heads")


def create(init: Callable[[jax.Array], Any], key: jax.Array, mesh: Mesh):
    """init(key), a parameter tree or one that mirrors it, with each shard created on its own device."""
    layout = parameter_shardings(mesh, jax.eval_shape(init, key))
    return jax.jit(init, out_shardings=layout, compiler_options=compiler_options(mesh))(key)


def is_absent(mesh: Mesh) -> bool:
    """Whether programs can only be compiled for a mesh's devices, since they are not here."""
    return mesh.devices.flat[0] not in jax.devices()


def lowering_for(mesh: Mesh) -> contextlib.AbstractContextManager:
    """Within it, kernels are lowered for the mesh's kind of device; JAX 0.12 needs that if the device is absent."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if is_absent(mesh) else contextlib.nullcontext()


def compiler_options(mesh: Mesh) -> dict[str, int] | None:
    """Little optimisation on a CPU: compiles faster, to the same bits and speed. XLA_FLAGS may set a level.

    For a GPU that is not here, cuBLAS multiplies: XLA cannot tune its own products there, and some have no tiles.
    """
    option, device = "xla_backend_optimization_level", mesh.devices.flat[0]
    if device.platform == "gpu" and is_absent(mesh):
        return {"xla_gpu_enable_triton_gemm": False}
    return {option: 1} if device.platform == "cpu" and option not in os.environ.get("XLA_FLAGS", "") else None


def put_batch(batch: dict, sharding: NamedSharding) -> dict:
    """Sends this process's rows to its devices, without waiting: a dict of global arrays."""
    with jax.transfer_guard("allow"):  # meant here
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def put(values, shardings):
    """Sends a tree of host arrays, the same in every process, to devices. `shardings`: a like tree, or one for all."""

    def send(value, sharding):
        value = np.asarray(value)
        with jax.transfer_guard("allow"):  # meant here
            return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(send, values, jax.tree.broadcast(shardings, values))


def whole(arrays):
    """Makes global arrays readable in every process: replicates them over all devices if necessary."""
    leaves = jax.tree.leaves(arrays)
    if all(isinstance(leaf, np.ndarray) or leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
        return arrays
    return jax.device_put(arrays, replicated(leaves[0].sharding.mesh))
