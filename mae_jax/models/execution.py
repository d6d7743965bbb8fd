"""How a training step runs a model's blocks on a chip, where the settings leave that open."""

import dataclasses

from jax.sharding import Mesh

from mae_jax.models.config import MAEConfig
from mae_jax.models.flops import decoder_tokens, encoder_tokens
from mae_jax.runtime.memory import device_memory
from mae_jax.runtime.mesh import batch_parts
from mae_jax.runtime.processes import from_main

KEPT = 18  # values that a block keeps for its backward pass, for each token and each of the width's (counted: 17.3)
MOST_UNROLLED = {"cpu": 12, "gpu": 32, "tpu": 8}  # blocks of an encoder or decoder; more compile for too many minutes


def fit_step(model: MAEConfig, mesh: Mesh, rows: int, *, masked: bool = True) -> MAEConfig:
    """The model with `scan_unroll` and `remat` set, perhaps to pairs for the encoder and the decoder.

    A loop over blocks copies all that it keeps, twice: blocks are unrolled where the program compiles in minutes. They
    are computed again where what they keep of `rows` images would not fit into the chips' memory, and in a loop on a
    TPU, whose copies cost more. `masked`: there is a decoder, and the encoder sees visible patches alone.
    """
    device, depths = mesh.devices.flat[0], (model.depth, model.decoder_depth)
    most = MOST_UNROLLED.get(device.platform, 12)
    if device.platform == "cpu":
        unrolls = max(depths) <= most and mesh.shape["fsdp"] == 1 and not model.remat
        return dataclasses.replace(model, scan_unroll=model.scan_unroll or (max(depths) if unrolls else 1))
    unroll = tuple(model.scan_unroll or (depth if depth <= most else 1) for depth in depths)
    remat = model.remat
    if remat is None:
        memory = from_main(device_memory(mesh.local_devices[0]))  # all processes must compile the same program
        short = memory is not None and kept_bytes(model, rows / batch_parts(mesh), masked) > 0.8 * memory
        loops = (device.platform == "tpu" and blocks < depth for blocks, depth in zip(unroll, depths, strict=True))
        remat = tuple(short or loop for loop in loops)
    return dataclasses.replace(model, scan_unroll=unroll, remat=remat)


def kept_bytes(model: MAEConfig, rows: float, masked: bool) -> float:
    """About what the blocks of a model keep of `rows` images for the backward pass, in its compute type."""
    rows, size = rows * (model.masks_per_image if masked else 1), 2 if model.dtype == "bfloat16" else 4
    tokens = encoder_tokens(model) if masked else model.class_tokens + model.registers + model.num_patches
    stacks = [(model.depth, tokens, model.blocks)]
    stacks += [(model.decoder_depth, decoder_tokens(model), model.decoder_blocks)] * masked
    kept = 0.0
    for depth, tokens, blocks in stacks:
        weights = blocks.num_heads * tokens if blocks.attention == "xla" else 0
        kept += depth * tokens * (KEPT * blocks.width + weights)
    return rows * size * kept


def describe_execution(model: MAEConfig, masked: bool = True) -> str:
    """One line for people on a model of `fit_step`."""
    stacks = [("encoder", model.depth, model.blocks)] + [
        ("decoder", model.decoder_depth, model.decoder_blocks)
    ] * masked
    ways = {
        name: f"{'unrolled' if blocks.unroll >= depth else 'in a loop'}{', recomputed' if blocks.remat else ''}"
        for name, depth, blocks in stacks
    }
    if len(set(ways.values())) == 1:
        ways = {"blocks": ways["encoder"]}
    ways = ", ".join(f"{name} {way}" for name, way in ways.items())
    return f"{model.dtype} products, attention by {model.blocks.attention}, {ways}"
