"""Pre-norm Transformer blocks, stacked along depth and scanned."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

xavier_uniform = nnx.initializers.xavier_uniform()


class Linear(nnx.Linear):
    """A linear layer with Xavier-uniform kernel, as all of MAE's; the product in `dtype`, the bias and result float32.

    (nnx.Linear adds the bias in `dtype`: its gradient, a sum over all tokens of a batch, would be a bfloat16 sum.)
    """

    def __init__(
        self, inputs: int, outputs: int, *, dtype: jnp.dtype, rngs: nnx.Rngs, bias_init=nnx.initializers.zeros
    ):
        super().__init__(inputs, outputs, kernel_init=xavier_uniform, bias_init=bias_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., inputs] -> [..., outputs]
        product = jnp.dot(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return product.astype(jnp.float32) + self.bias[...]


def make_norm(width: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A LayerNorm in float32 whose variance is the mean of squared deviations (E[x^2] - E[x]^2 loses digits)."""
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def exact_gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) by the error function, in float32 (`jax.nn.gelu(approximate=False)` takes the costlier erfc)."""
    x = x.astype(jnp.float32)
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


class Attention(nnx.Module):
    """Multi-head self-attention. q, k and v are one matrix, whose Xavier bound is sqrt(6 / 4D)."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.num_heads, self.dtype = num_heads, dtype
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, d] -> [b, n, d]
        qkv = self.qkv(x).astype(self.dtype)
        q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.num_heads)
        # Logits and softmax are float32 inside; the scale is 1 / sqrt(head width).
        x = jax.nn.dot_product_attention(q, k, v)
        return self.out(rearrange(x, "b n h d -> b n (h d)"))


class Mlp(nnx.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden_width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(width, hidden_width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden_width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, d] -> [b, n, d]
        return self.fc2(exact_gelu(self.fc1(x)))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The residual stream is float32."""

    def __init__(self, width, num_heads, mlp_width, *, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = make_norm(width, epsilon, rngs=rngs)
        self.attention = Attention(width, num_heads, dtype=dtype, rngs=rngs)
        self.norm2 = make_norm(width, epsilon, rngs=rngs)
        self.mlp = Mlp(width, mlp_width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, branch_scales: jax.Array | None = None) -> jax.Array:
        """Maps [b, n, d] to [b, n, d]; `branch_scales` [2, b] multiplies the two residual branches of each example."""
        attention, mlp = (1, 1) if branch_scales is None else branch_scales[:, :, None, None]
        x = x + attention * self.attention(self.norm1(x))
        return x + mlp * self.mlp(self.norm2(x))


def create_blocks(depth: int, width: int, num_heads: int, mlp_width: int, *, epsilon, dtype, rngs: nnx.Rngs) -> Block:
    """`depth` blocks as one, whose parameters have a leading [depth] axis; each block has initial values of its own."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def create(rngs: nnx.Rngs) -> Block:
        return Block(width, num_heads, mlp_width, epsilon=epsilon, dtype=dtype, rngs=rngs)

    return create(rngs)


def scan_blocks(
    blocks: Block, x: jax.Array, *, remat: bool, unroll: int, branch_scales: jax.Array | None = None, frozen: int = 0
) -> jax.Array:
    """Sends x [b, n, d] through stacked blocks one after the other; compile time does not grow with depth.

    Args:
      remat: recompute each block in the backward pass instead of keeping its activations.
      unroll: blocks in one iteration of the compiled loop.
      branch_scales: [depth, 2, b], of drop path (`drop_path_scales`).
      frozen: first blocks that pass no gradient to their parameters; if x needs none either, they cost no backward
        pass.
    """
    graphdef, stacked = nnx.split(blocks)
    depth = len(jax.tree.leaves(stacked)[0])

    def apply_block(x, inputs):
        parameters, scales = inputs
        return nnx.merge(graphdef, parameters)(x, scales), None

    if remat:
        apply_block = jax.checkpoint(apply_block, prevent_cse=False)

    def part(first: int, last: int):
        return jax.tree.map(lambda leaf: leaf[first:last], (stacked, branch_scales))

    def run(x, inputs):
        return jax.lax.scan(apply_block, x, inputs, unroll=unroll)[0]

    if frozen == 0:
        return run(x, (stacked, branch_scales))
    x = run(x, jax.lax.stop_gradient(part(0, frozen)))
    return x if frozen == depth else run(x, part(frozen, depth))


def drop_path_scales(keys: jax.Array, rates: np.ndarray) -> jax.Array:
    """Random factors of the residual branches, [depth, 2, b] for keys [b] and rates [depth].

    A branch is left out with its block's rate, and divided by 1 - rate otherwise, which keeps its mean: stochastic
    depth (Huang et al. 2016, arXiv 1603.09382), drawn for each example and branch.
    """
    draws = jax.vmap(lambda key: jax.random.uniform(key, (len(rates), 2)), out_axes=-1)(keys)
    rates = jnp.asarray(rates, jnp.float32)[:, None, None]
    return (draws >= rates) / (1 - rates)
