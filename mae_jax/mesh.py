"""Devices: the mesh, and how arrays are laid out on it."""

import re

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mae_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# How parameters are laid out: the first pattern that is found in a parameter's path (such as
# "encoder/blocks/mlp/fc1/kernel") decides. Data parallelism keeps a whole copy on every device.
PARAMETER_RULES = ((r"", PartitionSpec()),)


def make_mesh(settings: ConfigDict) -> Mesh:
    """The mesh of all devices with axes data, fsdp and tensor; at most one of the sizes may be -1: what is left.

    Raises:
      UserError: if the sizes do not fit the number of devices, or ask for more than data parallelism in one process.
    """
    sizes = [settings[axis] for axis in AXES]
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    for axis in ("fsdp", "tensor"):
        if settings[axis] != 1:
            raise UserError(f"mesh.{axis}={settings[axis]}: only data parallelism is available; set mesh.{axis}=1")
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: only runs of one process are available")
    devices = jax.devices()
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"{text}: sizes are at least 1, and one of them may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise UserError(f"{text} does not fit {len(devices)} devices; set mesh.data=-1 to use all")
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading (batch) axis split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_parts(mesh: Mesh) -> int:
    """Number of parts that a batch is split into; batch sizes must be a multiple of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parameter_shardings(mesh: Mesh, tree):
    """The layout of every array of a tree of parameters, or of one that mirrors it such as the optimizer's state."""

    def sharding(path, _):
        name = "/".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)
        spec = next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_batch(batch: dict, sharding: NamedSharding) -> dict:
    """Sends this process's rows of a batch to its devices: a dict of global arrays, which may still be on their way."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
