"""Programs in StableHLO, serialised by `jax.export`: they run with JAX alone on CPUs, NVIDIA's GPUs and TPUs."""

from typing import Any

import jax
import jax.numpy as jnp

from mae_jax.interop.programs import Program, make_call, picture_processor
from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError

PLATFORMS = ("cpu", "cuda", "tpu")


def check(weights: Weights) -> None:
    """Raises UserError if a package is missing; every model can be written."""
    try:
        import flatbuffers  # noqa: F401  (by jax.export, which does not require it)
    except ImportError as error:
        raise UserError("format=stablehlo needs another package: pip install flatbuffers") from error


def serialize(weights: Weights, program: Program, about: dict[str, Any]) -> bytes:
    """A program for all platforms and any number of pictures, with its weights."""
    model, processor = MAEConfig(**weights.config["model"]), picture_processor(weights)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *model.image_size, model.channels), jnp.dtype(processor.dtype))]
    if "noise" in program.inputs:
        shapes.append(jax.ShapeDtypeStruct((batch, model.num_patches), jnp.float32))
    # Else GPUs and TPUs would round the factors of products to 10 or 8 bits, and results would depend on the chip.
    with jax.default_matmul_precision("highest"):
        exported = jax.export.export(jax.jit(make_call(weights, program)), platforms=PLATFORMS)(*shapes)
    return bytes(exported.serialize())
