"""Parameter trees: nested dicts of arrays; stacked blocks have a leading [depth] axis."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.runtime.sharding import gather


def count_parameters(parameters) -> int:
    """Number of values in a tree of arrays (or of their shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))


def join(*trees: dict) -> dict:
    """Merges nested dicts. Arrays with the same path are parts of stacked blocks and are concatenated."""
    parts: dict[tuple, list] = {}
    for tree in trees:
        for path, leaf in flatten_dict(tree).items():
            parts.setdefault(path, []).append(leaf)
    return unflatten_dict({path: leaves[0] if len(leaves) == 1 else _stack(leaves) for path, leaves in parts.items()})


def gather_outside_blocks(variables: dict) -> dict:
    """Inside `sharding.on_shards`: gathers all variables but the blocks', which are gathered one block at a time."""
    flat = flatten_dict(variables)
    rest = {path: leaf for path, leaf in flat.items() if "blocks" not in path}
    return unflatten_dict(flat | flatten_dict(gather(unflatten_dict(rest))))


def _stack(leaves: list):
    return (np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp).concatenate(leaves)


def split_trained(params: dict, trained_blocks: float | None, norm_trains: bool) -> tuple[dict, dict]:
    """Splits a classifier's parameters {"encoder": ..., "head": ...} into (trained, frozen); `join` inverts it.

    Args:
      trained_blocks: number of last blocks that train; 0.5: norm and MLP of the last one (paper, section 4.3); None:
        everything trains, including the embeddings.
      norm_trains: the encoder's final norm trains even if no block does.
    """
    if trained_blocks is None:
        return params, {}
    trained, frozen = {}, {}
    for path, leaf in flatten_dict(params).items():
        part, *rest = path
        if part == "encoder" and rest[0] == "blocks":
            first = len(leaf) - _trained_rows(rest[1], trained_blocks)
            if first > 0:
                frozen[path] = leaf[:first]
            if first < len(leaf):
                trained[path] = leaf[first:]
        elif part == "head" or (rest[0] == "norm" and (norm_trains or trained_blocks > 0)):
            trained[path] = leaf
        else:
            frozen[path] = leaf
    return unflatten_dict(trained), unflatten_dict(frozen)


def _trained_rows(layer: str, trained_blocks: float) -> int:
    """Number of last blocks in which a layer trains."""
    return 0 if trained_blocks == 0.5 and layer in ("norm1", "attention") else math.ceil(trained_blocks)
