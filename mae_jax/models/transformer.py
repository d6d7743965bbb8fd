"""Pre-norm Transformer blocks, stacked along depth and scanned."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from mae_jax.errors import UserError
from mae_jax.parallel import from_rows, gather, gathers_again, splits, to_columns

xavier_uniform = nnx.initializers.xavier_uniform()


def exact_gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) by the error function, in float32 (`jax.nn.gelu(approximate=False)` takes the costlier erfc)."""
    x = x.astype(jnp.float32)
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS = {  # model.activation -> the function between the two layers of an MLP
    "gelu": exact_gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "leaky_relu": jax.nn.leaky_relu,
    "mish": jax.nn.mish,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}
ATTENTION_BACKENDS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """What defines the blocks of an encoder or decoder."""

    width: int
    num_heads: int
    mlp_width: int
    epsilon: float = 1e-6  # of the norms
    activation: str = "gelu"
    qkv_bias: bool = True
    attention: str = "xla"
    dtype: str = "float32"  # of the matrix products


class Record(NamedTuple):
    """What `scan_blocks` returns besides its result. What is not asked for is not computed."""

    hidden_states: bool = False
    attentions: bool = False


NOTHING = Record()


class Recorded(NamedTuple):
    """What was recorded of `depth` blocks; None if not asked for."""

    hidden_states: jax.Array | None = None  # [depth + 1, b, n, d]: the first block's input, and each block's result
    attentions: jax.Array | None = None  # [depth, b, h, n, n] float32: weight of each token (last axis) for each


class Linear(nnx.Module):
    """A linear layer with Xavier-uniform kernel, as all of MAE's; the product in `dtype`, the bias and result float32.

    (nnx.Linear adds the bias in `dtype`: its gradient, a sum over all tokens of a batch, would be a bfloat16 sum.)

    Args:
      outputs: several numbers give the result several axes; the initial kernel is that of one matrix.
      split: by what the kernel is split where a mesh's tensor axis splits it: "columns", "rows", or None: it is whole.
    """

    def __init__(
        self,
        inputs: int,
        *outputs: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        bias_init=nnx.initializers.zeros,
        use_bias: bool = True,
        split: str | None = None,
    ):
        self.dtype, self.split = dtype, split
        kernel = xavier_uniform(rngs.params(), (inputs, math.prod(outputs)), jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(inputs, *outputs))
        self.bias = nnx.Param(bias_init(rngs.params(), outputs, jnp.float32)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., inputs] -> [..., *outputs]
        if self.split == "columns":
            x = to_columns(x)
        kernel = self.kernel[...].astype(self.dtype)
        product = jnp.dot(x.astype(self.dtype), kernel.reshape(len(kernel), -1)).astype(jnp.float32)
        product = product.reshape(*x.shape[:-1], *kernel.shape[1:])
        if self.split == "rows":
            product = from_rows(product)
        return product if self.bias is None else product + self.bias[...]


def make_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm in float32 whose variance is the mean of squared deviations (E[x^2] - E[x]^2 loses digits)."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head self-attention. q, k and v are one matrix [D, 3, D], whose Xavier bound is sqrt(6 / 4D)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config, self.dtype, width = config, jnp.dtype(config.dtype), config.width
        self.qkv = Linear(width, 3, width, dtype=self.dtype, use_bias=config.qkv_bias, split="columns", rngs=rngs)
        self.out = Linear(width, width, dtype=self.dtype, split="rows", rngs=rngs)

    def __call__(self, x: jax.Array, weights: bool = False) -> tuple[jax.Array, jax.Array | None]:
        """Maps [b, n, d] to [b, n, d]; with `weights` also returns the attention [b, h, n, n]."""
        if self.config.attention == "cudnn" and jax.default_backend() != "gpu":
            raise UserError(
                f"model.attention=cudnn needs an NVIDIA GPU, but JAX runs on {jax.default_backend()}: "
                "set model.attention=xla"
            )
        qkv = self.qkv(x).astype(self.dtype)
        # On a mesh, these are the heads of this device's columns.
        head_width = self.config.width // self.config.num_heads
        q, k, v = rearrange(qkv, "b n three (h d) -> three b n h d", d=head_width)
        # Logits and softmax are float32 inside; the scale is 1 / sqrt(head width).
        x = jax.nn.dot_product_attention(q, k, v, implementation=self.config.attention)
        # No back-end returns its weights: they are computed once more, so that the result does not depend on them.
        attention = attention_weights(q, k) if weights else None
        return self.out(rearrange(x, "b n h d -> b n (h d)")), attention


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) in float32, [b, h, n, n], of queries and keys [b, n, h, d]."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them; in MAE the exact (erf) GELU."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.activation, dtype = config.activation, jnp.dtype(config.dtype)
        self.fc1 = Linear(config.width, config.mlp_width, dtype=dtype, split="columns", rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, dtype=dtype, split="rows", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, d] -> [b, n, d]
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The residual stream is float32."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.norm1 = make_norm(config.width, config.epsilon, rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.norm2 = make_norm(config.width, config.epsilon, rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, branch_scales: jax.Array | None = None, weights: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps [b, n, d] to [b, n, d], and returns the attention [b, h, n, n] if `weights` are asked for.

        `branch_scales` [2, b] multiplies the two residual branches of each example.
        """
        attention_scale, mlp_scale = (1, 1) if branch_scales is None else branch_scales[:, :, None, None]
        update, attention = self.attention(self.norm1(x), weights)
        x = x + attention_scale * update
        return x + mlp_scale * self.mlp(self.norm2(x)), attention


def create_blocks(depth: int, config: BlockConfig, *, rngs: nnx.Rngs) -> Block:
    """`depth` blocks as one, whose parameters have a leading [depth] axis; each block has initial values of its own."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs=rngs)

    return create(rngs)


def scan_blocks(
    blocks: Block,
    x: jax.Array,
    *,
    remat: bool,
    unroll: int,
    branch_scales: jax.Array | None = None,
    frozen: int = 0,
    record: Record = NOTHING,
) -> tuple[jax.Array, Recorded]:
    """Sends x [b, n, d] through stacked blocks one after the other; compile time does not grow with depth.

    Args:
      remat: recompute each block in the backward pass instead of keeping its activations.
      unroll: blocks in one iteration of the compiled loop.
      branch_scales: [depth, 2, b], of drop path (`drop_path_scales`).
      frozen: first blocks that pass no gradient to their parameters; if x needs none either, they cost no backward
        pass.
      record: what else to return.
    """
    graphdef, stacked = nnx.split(blocks)
    stacked = nnx.to_pure_dict(stacked)
    depth = len(jax.tree.leaves(stacked)[0])
    dtype = blocks.attention.dtype

    def apply_block(x, inputs):
        parameters, scales = inputs
        x, attention = nnx.merge(graphdef, gather(parameters, dtype))(x, scales, record.attentions)
        return x, (x if record.hidden_states else None, attention)

    if remat:
        apply_block = jax.checkpoint(apply_block, prevent_cse=False)
    elif splits("fsdp"):
        apply_block = jax.checkpoint(apply_block, prevent_cse=False, policy=gathers_again)

    def part(first: int, last: int):
        return jax.tree.map(lambda leaf: leaf[first:last], (stacked, branch_scales))

    def run(x, inputs):
        return jax.lax.scan(apply_block, x, inputs, unroll=unroll)

    if frozen == 0:
        result, recorded = run(x, (stacked, branch_scales))
    else:
        result, recorded = run(x, jax.lax.stop_gradient(part(0, frozen)))
        if frozen < depth:
            result, rest = run(result, part(frozen, depth))
            recorded = jax.tree.map(lambda *parts: jnp.concatenate(parts), recorded, rest)
    states, attentions = recorded
    if states is not None:
        states = jnp.concatenate([x[None], states])
    return result, Recorded(states, attentions)


def drop_path_scales(keys: jax.Array, rates: np.ndarray) -> jax.Array:
    """Random factors of the residual branches, [depth, 2, b] for keys [b] and rates [depth].

    A branch is left out with its block's rate, and divided by 1 - rate otherwise, which keeps its mean: stochastic
    depth (Huang et al. 2016, arXiv 1603.09382), drawn for each example and branch.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(rates), 2)), out_axes=-1)(keys)
    rates = jnp.asarray(rates, jnp.float32)[:, None, None]
    return (draws >= rates) / (1 - rates)
