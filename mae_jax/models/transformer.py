"""Pre-norm Transformer blocks, stacked along depth and scanned."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_jax.models.layers import Attention, BlockConfig, Mlp, PreNorm
from mae_jax.runtime.sharding import checkpoint_policy, gather

# Hidden states [depth + 1, b, n, d] (the first block's input, then each block's result), and attentions
# [depth, b, h, n, n] (softmax over the last axis); None for what was not requested.
Recorded = tuple[jax.Array | None, jax.Array | None]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with x in the compute type. A memory comes already normed."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.norm1 = PreNorm(config.width, config.epsilon, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = PreNorm(config.width, config.epsilon, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        branch_scales: jax.Array | None,
        memory: jax.Array | None,
        weights: bool,
        count: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """[b, n, d] -> [b, n, d], and with `weights` the attention. See `scan_blocks` for the arguments."""
        attention_scale, mlp_scale = (1, 1) if branch_scales is None else branch_scales[:, :, None, None]
        update, attention = self.attention(self.norm1(x), memory, weights, count)
        x = (x + attention_scale * update).astype(x.dtype)
        return (x + mlp_scale * self.mlp(self.norm2(x))).astype(x.dtype), attention


def create_blocks(depth: int, config: BlockConfig, *, rngs: nnx.Rngs) -> Block:
    """`depth` independently initialised blocks as one, whose parameters have a leading [depth] axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs=rngs)

    return create(rngs)


def scan_blocks(
    blocks: Block,
    x: jax.Array,
    *,
    branch_scales: jax.Array | None = None,  # [depth, 2, b], factors of the residual branches (`drop_path_scales`)
    memory: jax.Array | None = None,  # [b, m, memory_width], for cross-attention
    count: jax.Array | None = None,  # [b], only the first so many tokens, or of the memory, are attended to; None: all
    frozen: int = 0,  # first blocks whose parameters get no gradient; if x needs none, they have no backward pass
    record: tuple[bool, bool] = (False, False),  # whether to return hidden states, and attentions
) -> tuple[jax.Array, Recorded]:
    """Applies stacked blocks to x [b, n, d] in one compiled loop, or in loops of `unroll` blocks."""
    config, x = blocks.attention.config, x.astype(blocks.attention.dtype)
    graphdef, stacked = nnx.split(blocks)
    stacked = nnx.to_pure_dict(stacked)
    depth = len(jax.tree.leaves(stacked)[0])

    def apply_block(x, inputs):
        parameters, scales = inputs
        block = nnx.merge(graphdef, gather(parameters, blocks.attention.dtype))
        x, attention = block(x, scales, memory, record[1], count)
        return x, (x if record[0] else None, attention)

    policy = None if config.remat else checkpoint_policy()
    if config.remat or policy:
        # Without a loop, the compiler would merge recomputed values with the originals.
        apply_block = jax.checkpoint(apply_block, prevent_cse=config.unroll >= depth, policy=policy)

    def run(x, first: int, last: int):
        inputs = jax.tree.map(lambda leaf: leaf[first:last], (stacked, branch_scales))
        inputs = jax.lax.stop_gradient(inputs) if last <= frozen else inputs
        return jax.lax.scan(apply_block, x, inputs, unroll=config.unroll)

    result, recorded = run(x, 0, frozen or depth)
    if 0 < frozen < depth:
        result, rest = run(result, frozen, depth)
        recorded = jax.tree.map(lambda *parts: jnp.concatenate(parts), recorded, rest)
    states, attentions = recorded
    return result, (states if states is None else jnp.concatenate([x[None], states]).astype(jnp.float32), attentions)


def scan_to(blocks: Block, x: jax.Array, layers: tuple[int, ...]) -> dict[int, jax.Array]:
    """x after each of these numbers of stacked blocks (at least 1); those after the last are not run."""
    graphdef, stacked = nnx.split(blocks)
    reached = {}
    for first, last in itertools.pairwise([0, *sorted(set(layers))]):
        part = nnx.merge(graphdef, jax.tree.map(lambda leaf, rows=slice(first, last): leaf[rows], stacked))
        x, _ = scan_blocks(part, x)
        reached[last] = x
    return reached


def drop_path_scales(keys: jax.Array, rates: np.ndarray) -> jax.Array:
    """Stochastic depth (arXiv 1603.09382): factors [depth, 2, b], 0 with probability `rates` [depth]."""
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(rates), 2)), out_axes=-1)(keys)
    rates = jnp.asarray(rates, jnp.float32)[:, None, None]
    return (draws >= rates) / (1 - rates)
