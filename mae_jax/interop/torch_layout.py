"""Parameters of our models and tensors of PyTorch ones: names and layouts, in both directions.

The names are those of facebookresearch/mae, which timm shares; `huggingface` brings its own to them and back. Our
blocks are stacked along depth and our kernels are [inputs, outputs]; theirs stand one by one, and are
[outputs, inputs].
"""

import contextlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.interop.tensors import Tensor
from mae_jax.models.classifier import ClassifierConfig
from mae_jax.runtime.errors import UserError

# A state: tensors by facebookresearch's names. A tensor may come in parts (queries, keys, values), to be put one below
# the other along its first axis.
State = dict[str, tuple[Tensor, ...]]

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
# Where a classifier differs: the norm of the patch tokens' mean has another name; and a linear probe's BatchNorm and
# linear layer are the first and second part of the head.
POOLED_NORM = {"encoder/norm": "fc_norm"}
PROBE_HEAD = {"head/linear": "head.1", "head/batch_norm": "head.0"}
IN_BLOCK = {"attention/qkv": "attn.qkv", "attention/out": "attn.proj", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}
LEAVES = {
    "kernel": ".weight", "scale": ".weight", "bias": ".bias", "mean": ".running_mean", "variance": ".running_var",
    "class_token": "", "mask_token": "", "positions": "",
}  # fmt: skip
TILE = 256  # rows and columns that are transposed at a time: what fits in a core's cache


def renamings(classifier: ClassifierConfig | None) -> dict[str, str]:
    """The changes of `MODULES` for a classifier; none for an autoencoder."""
    if classifier is None:
        return {}
    return (POOLED_NORM if classifier.pool == "mean_norm" else {}) | (PROBE_HEAD if classifier.batch_norm else {})


class Place(NamedTuple):
    """Where a tensor of theirs stands in a parameter of ours."""

    name: str  # theirs
    path: tuple[str, ...]  # of our parameter
    block: int | None  # of a stacked parameter
    shape: tuple[int, ...]  # of their tensor


def places(shapes: dict, renamed: dict[str, str], patch_size: int) -> Iterator[Place]:
    """All tensors that make up parameters.

    Args:
      shapes: nested dict of arrays, or of their abstract shapes.
      renamed: changes of `MODULES`.
    """
    modules = MODULES | renamed
    for path, leaf in flatten_dict(shapes).items():
        module, shape = modules["/".join(path[:2])], tuple(leaf.shape)
        if path[1] == "blocks":
            inner = "/".join(path[2:-1])
            end = f"{IN_BLOCK.get(inner, inner)}{LEAVES[path[-1]]}"
            for block in range(shape[0]):
                yield Place(f"{module}.{block}.{end}", path, block, _their_shape(path, shape[1:], patch_size))
        else:
            yield Place(module + LEAVES[path[-1]], path, None, _their_shape(path, shape, patch_size))


def _their_shape(path: tuple[str, ...], shape: tuple[int, ...], patch_size: int) -> tuple[int, ...]:
    if path[-1] == "positions":
        return (1, *shape)
    if path[-2:] == ("patch_embed", "kernel"):
        return (shape[1], shape[0] // patch_size**2, patch_size, patch_size)
    if path[-2] == "qkv":  # ours apart, [inputs, 3, outputs] and [3, outputs], theirs one below the other
        shape = (*shape[:-2], 3 * shape[-1])
    return shape[::-1] if path[-1] == "kernel" else shape


def read_params(state: State, shapes: dict, renamed: dict[str, str], patch_size: int, source: str) -> dict[str, Any]:
    """Our parameters, of the given shapes, as a nested dict of float32 NumPy arrays.

    Everything is checked before anything is read.

    Raises:
      UserError: for tensors that are missing, have another shape, or hold NaN or infinity.
    """
    found = list(places(shapes, renamed, patch_size))
    missing = [place.name for place in found if place.name not in state]
    if missing:
        raise UserError(f"{source} lacks {listed(missing)}: it is not whole, or not a masked autoencoder's")
    for place in found:
        shape = stacked_shape(state[place.name])
        if shape != place.shape:
            raise UserError(f"{source}: {place.name} has shape {shape}, but the model's settings make it {place.shape}")
    params = {path: empty_pages(leaf.shape) for path, leaf in flatten_dict(shapes).items()}

    @np.errstate(over="ignore")  # what float32 does not hold is refused below
    def copy(place: Place) -> None:
        array = params[place.path]
        target = array if place.block is None else array[place.block]
        if place.path[-2] == "qkv":
            target = target.reshape(place.shape[::-1])
        row = 0
        for part in state[place.name]:
            values = part.read()
            rows = slice(row, row + len(values))
            if place.path[-1] == "positions":
                target[...] = values[0]
            elif values.ndim == 4:  # [D, channel, row, column] -> [(row, column, channel), D]
                target[...] = values.transpose(2, 3, 1, 0).reshape(target.shape)
            elif place.path[-1] == "kernel":
                transpose_into(target[:, rows], values)
            else:
                target[rows] = values
            row = rows.stop
        if not np.isfinite(target).all():
            parts = state[place.name]
            name = next(part.name for part in parts if not np.isfinite(part.read().astype(np.float32)).all())
            raise UserError(f"{source}: tensor {name} holds NaN or infinity (in float32); take another file")

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(copy, found):  # raises what a thread has raised
            pass
    return unflatten_dict(params)


def write_state(params: dict, renamed: dict[str, str], patch_size: int) -> dict[str, np.ndarray]:
    """Tensors by facebookresearch's names of a nested dict of our parameters; inverts `read_params`."""
    flat, state = flatten_dict(params), {}
    for place in places(params, renamed, patch_size):
        values = np.asarray(flat[place.path], np.float32)
        values = values if place.block is None else values[place.block]
        if place.path[-2:] == ("patch_embed", "kernel"):
            d, channels, p, _ = place.shape
            values = values.reshape(p, p, channels, d).transpose(3, 2, 0, 1)
        elif place.path[-1] == "kernel":
            values = values.reshape(len(values), -1).T
        state[place.name] = np.ascontiguousarray(values).reshape(place.shape)
    return state


def stacked_shape(parts: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Shape of a tensor that comes in parts."""
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:]) if len(parts) > 1 else tuple(parts[0].shape)


def empty_pages(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array of fresh pages, huge ones where the system has them: there is less to map while it is filled.

    JAX takes over memory that begins with a page without a copy.
    """
    size = int(np.prod(shape))
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # other systems than Linux
        return np.empty(shape, np.float32)
    memory = mmap.mmap(-1, max(4 * size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.float32, size).reshape(shape)


def transpose_into(target: np.ndarray, values: np.ndarray) -> None:
    """target[...] = values.T, tile by tile: several times as fast as at once for matrices beyond the cache."""
    # A row longer than the tile, so that the tile's rows do not all fall on the same lines of the cache.
    tile = np.empty((TILE, TILE + 16), np.float32)
    rows, columns = values.shape
    for i in range(0, rows, TILE):
        for j in range(0, columns, TILE):
            part = values[i : i + TILE, j : j + TILE]
            copied = tile[: part.shape[0], : part.shape[1]]
            copied[...] = part
            target[j : j + TILE, i : i + TILE] = copied.T


def listed(names: list[str], most: int = 4) -> str:
    """Some of many names, for people."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
