"""How a training step runs a model's blocks on a chip, where the settings leave that open."""

import dataclasses

from jax.sharding import Mesh

from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import decoder_tokens, encoder_tokens
from mae_jax.runtime.memory import device_memory
from mae_jax.runtime.mesh import batch_parts

KEPT = 18  # values that a block keeps for its backward pass, for each token and each of the width's (counted: 17.3)
MOST_UNROLLED = {"cpu": 12, "gpu": 32, "tpu": 12}  # blocks of a stack: more compile for more than minutes


def fit_step(model: MAEConfig, mesh: Mesh, rows: int, *, masked: bool = True) -> MAEConfig:
    """The model with `scan_unroll` and `remat` set; `rows` images go through it at once, on all devices.

    A loop over blocks copies all that it keeps, twice: blocks are unrolled where the program compiles in minutes. They
    are computed again where what they keep would not fit into the chip's memory. `masked`: the decoder runs, too.
    """
    device, remat = mesh.devices.flat[0], model.remat
    if device.platform != "cpu" and remat is None:  # on a CPU None is the best
        memory = device_memory(device)
        remat = memory is not None and kept_bytes(model, rows / batch_parts(mesh), masked) > 0.8 * memory
    depth, most = max(model.depth, model.decoder_depth), MOST_UNROLLED.get(device.platform, 12)
    unrolls = depth <= most and (device.platform != "cpu" or mesh.shape["fsdp"] == 1 and not remat)
    return dataclasses.replace(model, remat=remat, scan_unroll=model.scan_unroll or (depth if unrolls else 1))


def kept_bytes(model: MAEConfig, rows: float, masked: bool) -> float:
    """About what the blocks of a model keep of `rows` images for the backward pass, in its compute type."""
    rows, size = rows * model.masks_per_image, 2 if model.dtype == "bfloat16" else 4
    tokens = encoder_tokens(model) if masked else model.class_tokens + model.registers + model.num_patches
    stacks = [(model.depth, tokens, model.blocks)]
    stacks += [(model.decoder_depth, decoder_tokens(model), model.decoder_blocks)] * masked
    kept = 0.0
    for depth, tokens, blocks in stacks:
        weights = blocks.num_heads * tokens if blocks.attention == "xla" else 0
        kept += depth * tokens * (KEPT * blocks.width + weights)
    return rows * size * kept


def describe_execution(model: MAEConfig) -> str:
    """One line for people."""
    loop = "unrolled" if model.scan_unroll >= max(model.depth, model.decoder_depth) else "in a loop"
    again = ", computed again in the backward pass" if model.remat else ""
    return f"{model.dtype} products, attention by {model.attention or 'xla'}, blocks {loop}{again}"
