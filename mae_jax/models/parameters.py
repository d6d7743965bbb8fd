"""Parameter trees: nested dicts of arrays; stacked blocks have a leading [depth] axis."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.runtime.sharding import gather


def count_parameters(parameters) -> int:
    """Number of values in a tree of arrays (or of their shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))


def join(*trees: dict) -> dict:
    """Merges nested dicts. Arrays with the same path are parts of stacked blocks and are concatenated."""
    parts: dict[tuple, list] = {}
    for tree in trees:
        for path, leaf in flatten_dict(tree).items():
            parts.setdefault(path, []).append(leaf)
    for path, leaves in parts.items():
        library = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
        parts[path] = leaves[0] if len(leaves) == 1 else library.concatenate(leaves)
    return unflatten_dict(parts)


def gather_outside_blocks(variables: dict) -> dict:
    """Inside `sharding.on_shards`: gathers all variables but the blocks', which are gathered one block at a time."""
    flat = flatten_dict(variables)
    rest = {path: leaf for path, leaf in flat.items() if "blocks" not in path}
    return unflatten_dict(flat | flatten_dict(gather(unflatten_dict(rest))))
