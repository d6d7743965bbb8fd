"""Multi-head self-attention and cross-attention."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mae_jax.models.layers import BlockConfig, Linear
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.platform import Normed, attention, attention_weights


class Attention(nnx.Module):
    """Self-attention with one kernel [D, 3, D] for q, k and v, whose Xavier bound is sqrt(6 / 4D).

    With `config.memory_width`, cross-attention: kernels [D, D] for queries, [memory_width, 2, D] for keys and values.
    """

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config, self.dtype, width = config, jnp.dtype(config.dtype), config.width
        options = dict(dtype=self.dtype, use_bias=config.qkv_bias, rngs=rngs)
        if config.memory_width is None:
            self.qkv = Linear(width, 3, width, **options)
        else:
            self.q, self.kv = Linear(width, width, **options), Linear(config.memory_width, 2, width, **options)
        self.out = Linear(width, width, dtype=self.dtype, rngs=rngs)
        if config.qk_norm:
            head_width = width // config.num_heads
            self.q_norm, self.k_norm = HeadNorm(head_width, config.epsilon), HeadNorm(head_width, config.epsilon)

    def __call__(
        self, x: Normed, memory: jax.Array | None = None, weights: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """[b, n, d], memory [b, m, memory_width] -> [b, n, d], and with `weights` the weights [b, h, n, n or m]."""
        head_width = self.config.width // self.config.num_heads
        if memory is None:
            queries, keys, values = jnp.split(self.qkv(x), 3, axis=2)  # the gradient is one join, not a sum
        else:
            queries = self.q(x)[:, :, None]
            keys, values = jnp.split(self.kv(memory), 2, axis=2)
        q, k, v = (rearrange(x, "b n 1 (h d) -> b n h d", d=head_width) for x in (queries, keys, values))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q * head_width**-0.5  # fewer numbers than the logits, and still in float32
        q, k, v = (x.astype(self.dtype) for x in (q, k, v))
        if self.config.attention == "cudnn":
            if jax.default_backend() != "gpu":
                raise UserError(
                    f"model.attention=cudnn needs an NVIDIA GPU, but JAX runs on {jax.default_backend()}: "
                    "set model.attention=xla"
                )
            attended = jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")
        else:
            attended = attention(q, k, v)
        out = self.out(rearrange(attended, "b n h d -> b n (h d)"))
        return out, attention_weights(
            q, k
        ) if weights else None  # recomputed, so that the result is the same with and without


class HeadNorm(nnx.Module):
    """LayerNorm over each head's width, with one scale for all heads (Dehghani et al. 2023, arXiv 2302.05442)."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon, self.scale = epsilon, nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, h, d] float32 -> [b, n, h, d] float32
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.epsilon)
        return normed * self.scale[...]
