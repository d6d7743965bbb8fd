"""Multi-head attention: of tokens to one another, or to the tokens of a memory."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mae_jax.errors import UserError
from mae_jax.models.layers import BlockConfig, Linear
from mae_jax.parallel import to_columns


class Attention(nnx.Module):
    """Multi-head attention. Of self-attention q, k and v are one matrix [D, 3, D], whose Xavier bound is sqrt(6 / 4D).

    With `config.memory_width` it is cross-attention: queries [D, D] of the tokens, keys and values [memory_width, 2, D]
    of a memory.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config, self.dtype, width = config, jnp.dtype(config.dtype), config.width
        if config.memory_width is None:
            self.qkv = Linear(width, 3, width, dtype=self.dtype, use_bias=config.qkv_bias, split="columns", rngs=rngs)
        else:
            options = dict(dtype=self.dtype, use_bias=config.qkv_bias, split="columns", rngs=rngs)
            self.q, self.kv = Linear(width, width, **options), Linear(config.memory_width, 2, width, **options)
        self.out = Linear(width, width, dtype=self.dtype, split="rows", rngs=rngs)
        if config.qk_norm:
            head_width = width // config.num_heads
            self.q_norm, self.k_norm = HeadNorm(head_width, config.epsilon), HeadNorm(head_width, config.epsilon)

    def __call__(
        self, x: jax.Array, memory: jax.Array | None = None, weights: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps [b, n, d] to [b, n, d]; with `weights` also returns the attention [b, h, n, n or m].

        `memory` [b, m, memory_width] is what cross-attention attends to.
        """
        if self.config.attention == "cudnn" and jax.default_backend() != "gpu":
            raise UserError(
                f"model.attention=cudnn needs an NVIDIA GPU, but JAX runs on {jax.default_backend()}: "
                "set model.attention=xla"
            )
        # On a mesh, these are the heads of this device's columns.
        head_width = self.config.width // self.config.num_heads
        if memory is None:
            qkv = self.qkv(x).astype(self.dtype)
            q, k, v = rearrange(qkv, "b n three (h d) -> three b n h d", d=head_width)
        else:
            q = rearrange(self.q(x).astype(self.dtype), "b n (h d) -> b n h d", d=head_width)
            k, v = rearrange(self.kv(memory).astype(self.dtype), "b m two (h d) -> two b m h d", d=head_width)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        by_head = [rearrange(x, "b n h d -> (b h) n d") for x in (q, k, v)]
        if self.config.attention == "cudnn":
            x = rearrange(jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), "b n h d -> b n (h d)")
        else:
            x = rearrange(attend(*by_head), "(b h) n d -> b n (h d)", b=len(x))
        # No back-end returns its weights: they are computed once more, so that the result does not depend on them.
        attention = rearrange(attention_weights(*by_head[:2]), "(b h) n m -> b h n m", b=len(x)) if weights else None
        return self.out(x), attention


class HeadNorm(nnx.Module):
    """LayerNorm over each head's width, with a scale that all heads share (Dehghani et al. 2023, arXiv 2302.05442)."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon, self.scale = epsilon, nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, h, d] -> [b, n, h, d], in the type of x
        centred = x.astype(jnp.float32) - jnp.mean(x.astype(jnp.float32), axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.epsilon)
        # Each device of a mesh has some of the heads: the gradients of the scale that they share are summed.
        return (normed * to_columns(self.scale[...])).astype(x.dtype)


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v of queries [x, n, d], keys and values [x, m, d]; logits and softmax in float32.

    x counts the heads of all images: products of one batch axis are the fastest. For the backward pass the weights
    [x, n, m] are kept once, in the type of q (`jax.nn.dot_product_attention` keeps them twice, in float32).
    """
    return _attend_forward(q, k, v)[0]


def _attend_forward(q, k, v):
    weights = attention_weights(q, k).astype(q.dtype)
    return jnp.einsum("xqk,xkd->xqd", weights, v), (q, k, v, weights)


def _attend_backward(saved, gradient):
    q, k, v, weights = saved
    of_v = jnp.einsum("xqk,xqd->xkd", weights, gradient)
    of_weights = jnp.einsum("xqd,xkd->xqk", gradient, v, preferred_element_type=jnp.float32)
    weights = weights.astype(jnp.float32)
    of_logits = weights * (of_weights - jnp.sum(weights * of_weights, axis=-1, keepdims=True))
    of_logits = (of_logits * q.shape[-1] ** -0.5).astype(q.dtype)
    return jnp.einsum("xqk,xkd->xqd", of_logits, k), jnp.einsum("xqk,xqd->xkd", of_logits, q), of_v


attend.defvjp(_attend_forward, _attend_backward)


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) in float32, [x, n, m], of queries [x, n, d] and keys [x, m, d]."""
    logits = jnp.einsum("xqd,xkd->xqk", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
