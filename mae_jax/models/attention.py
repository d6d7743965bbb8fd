"""Multi-head attention: of tokens to one another, or to the tokens of a memory."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mae_jax.models.layers import BlockConfig, LayerNorm, Linear
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.sharding import to_columns

CPU_GROUPS = 4  # more take longer to compile, and are no faster on two cores
WORTH_GROUPS = 2**25  # multiplications of one of attention's products


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
        self, x: jax.Array, norm: LayerNorm, memory: jax.Array | None = None, weights: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Maps x [b, n, d], which is normed first, to [b, n, d].

        `memory` [b, m, memory_width] is what cross-attention attends to; it is not normed. With `weights` the attention
        [b, h, n, n or m] is returned, too.
        """
        if self.config.attention == "cudnn" and jax.default_backend() != "gpu":
            raise UserError(
                f"model.attention=cudnn needs an NVIDIA GPU, but JAX runs on {jax.default_backend()}: "
                "set model.attention=xla"
            )
        # On a mesh, these are the heads of this device's columns.
        head_width = self.config.width // self.config.num_heads
        if memory is None:
            queries, keys, values = jnp.split(self.qkv(x, norm), 3, axis=2)  # the gradient is one join, not a sum
        else:
            queries = self.q(x, norm)[:, :, None]
            keys, values = jnp.split(self.kv(memory), 2, axis=2)
        q, k, v = (rearrange(x, "b n 1 (h d) -> b n h d", d=head_width) for x in (queries, keys, values))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q * head_width**-0.5  # fewer numbers than the logits, and still in float32
        q, k, v = (x.astype(self.dtype) for x in (q, k, v))
        if self.config.attention == "cudnn":
            attended = jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")
        else:
            attended = attend_in_groups(q, k, v)
        attention = None
        if weights:  # no back-end returns them: they are computed once more, so that the result does not depend on them
            attention = rearrange(attention_weights(_by_head(q), _by_head(k)), "(b h) n m -> b h n m", b=len(x))
        return self.out(rearrange(attended, "b n h d -> b n (h d)")), attention


class HeadNorm(nnx.Module):
    """LayerNorm over each head's width, with a scale that all heads share (Dehghani et al. 2023, arXiv 2302.05442)."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon, self.scale = epsilon, nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, h, d] float32 -> [b, n, h, d] float32
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.epsilon)
        # Each device of a mesh has some of the heads: the gradients of the scale that they share are summed.
        return normed * to_columns(self.scale[...])


def attend_in_groups(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of each image by itself: scaled queries [b, n, h, d], keys, values [b, m, h, d] to [b, n, h, d].

    XLA (0.10) computes one product of many small matrices on one core of a CPU, but several products side by side. So
    there, where there is much to compute, the images are a few groups.
    """
    groups = 1
    if jax.default_backend() == "cpu" and q.size * k.shape[1] >= WORTH_GROUPS:
        groups = min(CPU_GROUPS, len(q))
    parts = zip(*(jnp.array_split(x, groups) for x in (q, k, v)), strict=True)
    attended = [attend(*map(_by_head, part)) for part in parts]
    return jnp.concatenate([rearrange(x, "(b h) n d -> b n h d", h=q.shape[2]) for x in attended])


def _by_head(x: jax.Array) -> jax.Array:
    return rearrange(x, "b n h d -> (b h) n d")


@jax.custom_vjp
def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T) v of scaled queries [x, n, d], keys and values [x, m, d]; logits and softmax in float32.

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
    of_logits = of_logits.astype(q.dtype)
    return jnp.einsum("xqk,xkd->xqd", of_logits, k), jnp.einsum("xqk,xqd->xkd", of_logits, q), of_v


attend.defvjp(_attend_forward, _attend_backward)


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(q k^T) in float32, [x, n, m], of scaled queries [x, n, d] and keys [x, m, d]."""
    return jax.nn.softmax(jnp.einsum("xqd,xkd->xqk", q, k, preferred_element_type=jnp.float32), axis=-1)
