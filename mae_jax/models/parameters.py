"""Parameter trees: nested dicts of arrays; stacked blocks have a leading [depth] axis."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
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


@functools.lru_cache(maxsize=16)  # tracing a model takes longer than loading it
def split(model: Callable[..., nnx.Module], config: Any, **options) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of `model(config, **options)`, and the shapes and dtypes of its variables."""
    return nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0), **options)))


def binder(model: Callable[..., nnx.Module], config: Any, **options) -> Callable[[dict], nnx.Module]:
    """A pure function from variables (a nested dict) to the model; on shards, blocks are gathered one at a time."""
    graphdef, _ = split(model, config, **options)

    def bind(variables: dict) -> nnx.Module:
        flat = flatten_dict(variables)
        rest = {path: leaf for path, leaf in flat.items() if "blocks" not in path}
        return nnx.merge(graphdef, unflatten_dict(flat | flatten_dict(gather(unflatten_dict(rest)))))

    return bind
