"""Meshes of some of the eight devices that the tests have."""

import math

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.runtime.mesh import AXES, make_mesh


def device_mesh(*sizes: int) -> Mesh:
    """A mesh of `sizes` along data, fsdp and tensor; what is left out is 1."""
    sizes = (*sizes, 1, 1, 1)[:3]
    return make_mesh(ConfigDict(dict(zip(AXES, sizes, strict=True))), jax.devices()[: math.prod(sizes)])
