"""Converts our parameters to and from PyTorch's tensors, under the names of facebookresearch/mae and timm.

Our blocks are stacked along depth, and our kernels are [inputs, outputs]; their blocks are separate, [outputs, inputs].
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.interop.tensors import Tensor
from mae_jax.models.classifier import ClassifierConfig
from mae_jax.runtime.errors import UserError

MODULES = {  # ours -> theirs
    "encoder/patch_embed": "patch_embed.proj",
    "encoder/class_token": "cls_token",
    "encoder/positions": "pos_embed",
    "encoder/blocks": "blocks",
    "encoder/norm": "norm",
    "decoder/embed": "decoder_embed",
    "decoder/mask_token": "mask_token",
    "decoder/positions": "decoder_pos_embed",
    "decoder/blocks": "decoder_blocks",
    "decoder/norm": "decoder_norm",
    "decoder/predict": "decoder_pred",
    "head/linear": "head",
}
IN_BLOCK = {"attention/qkv": "attn.qkv", "attention/out": "attn.proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
LEAVES = {
    "kernel": ".weight", "scale": ".weight", "bias": ".bias", "mean": ".running_mean", "variance": ".running_var",
    "class_token": "", "mask_token": "", "positions": "",
}  # fmt: skip


def their_names(shapes: dict, classifier: ClassifierConfig | None) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Each path in the nested dict `shapes`, with its tensors' names: one for each block of a stack, else one."""
    modules = dict(MODULES)
    if classifier and classifier.pool == "mean_norm":  # the norm is of the patch tokens' mean
        modules["encoder/norm"] = "fc_norm"
    if classifier and classifier.batch_norm:  # a linear probe's head begins with it
        modules |= {"head/linear": "head.1", "head/batch_norm": "head.0"}
    for path, leaf in flatten_dict(shapes).items():
        module, end = modules["/".join(path[:2])], LEAVES[path[-1]]
        if path[1] == "blocks":
            inner = "/".join(path[2:-1])
            yield path, [f"{module}.{block}.{IN_BLOCK.get(inner, inner)}{end}" for block in range(leaf.shape[0])]
        else:
            yield path, [module + end]


def to_theirs(path: tuple[str, ...], values: np.ndarray, patch_size: int) -> np.ndarray:
    """Our parameter at `path`, or one block of it, as one of their tensors."""
    if path[-1] == "positions":
        return values[None]
    if path[-2:] == ("patch_embed", "kernel"):
        return rearrange(values, "(h w c) d -> d c h w", h=patch_size, w=patch_size)
    if path[-2] == "qkv":  # ours are separate, theirs concatenated
        values = values.reshape(*values.shape[:-2], -1)
    return values.T if path[-1] == "kernel" else values


def read_params(
    state: dict[str, Tensor], shapes: dict, classifier: ClassifierConfig | None, patch_size: int
) -> dict[str, Any]:
    """Our parameters as a nested dict of float32 arrays; checks all names and shapes before reading any values."""
    flat, names = flatten_dict(shapes), dict(their_names(shapes, classifier))
    for path, leaf in flat.items():
        own = np.broadcast_to(np.float32(0), leaf.shape)
        expected = to_theirs(path, own[0] if path[1] == "blocks" else own, patch_size).shape
        for name in names[path]:
            if state[name].shape != expected:
                found = state[name].shape
                raise UserError(f"{name} has shape {found}, but the model's settings make it {expected}")
    params = {}
    for path, leaf in flat.items():
        memory = np.empty(math.prod(leaf.shape) + 16, np.float32)
        start = -memory.ctypes.data % 64 // 4  # JAX takes over aligned memory on a CPU without a copy
        params[path] = memory[start:][: math.prod(leaf.shape)].reshape(leaf.shape)
        parts = params[path] if path[1] == "blocks" else params[path][None]
        for part, name in zip(parts, names[path], strict=True):
            values = state[name].values()  # from here on, the inverse of `to_theirs`
            if path[-2:] == ("patch_embed", "kernel"):
                values = rearrange(values, "d c h w -> (h w c) d")
            elif path[-1] == "kernel":
                values = values.T
            values = values.reshape(part.shape)
            for first in range(0, part.shape[-1], 16):  # 16 columns at a time: twice as fast if transposed
                part[..., first : first + 16] = values[..., first : first + 16]
    return unflatten_dict(params)


def write_state(params: dict, classifier: ClassifierConfig | None, patch_size: int) -> dict[str, np.ndarray]:
    """Inverts `read_params`: our nested dict as their tensors by name."""
    flat, state = flatten_dict(params), {}
    for path, names in their_names(params, classifier):
        values = np.asarray(flat[path], np.float32)
        for name, part in zip(names, values if path[1] == "blocks" else values[None], strict=True):
            state[name] = to_theirs(path, part, patch_size)
    return state
