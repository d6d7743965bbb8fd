"""The layers of Transformer blocks: norms, linear layers, MLP and attention."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mae_jax.runtime.platform import Normed, attention, attention_weights, linear, recomputed


@jax.custom_jvp
def _erf(x: jax.Array) -> jax.Array:
    return jax.lax.erf(x)


# JAX's own rule fails on a mesh in 0.12.0 (in the primitive `polynomial`).
_erf.defjvps(lambda tangent, value, x: 2 / math.sqrt(math.pi) * (tangent * jnp.exp(-jnp.square(x))))


def exact_gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) with erf (`jax.nn.gelu(approximate=False)` uses the costlier erfc)."""
    return 0.5 * x * (1 + _erf(x * 0.5**0.5))


ACTIVATIONS = {
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


def of_each_value(fn: Callable) -> Callable:
    """fn of each value, computed in float32; its derivative keeps only the slope, in the type of the values."""

    @jax.custom_jvp
    def run(x):
        return fn(x.astype(jnp.float32)).astype(x.dtype)

    @run.defjvp
    def tangent(primals, tangents):
        x = primals[0].astype(jnp.float32)
        value, slope = jax.jvp(fn, (x,), (jnp.ones_like(x),))
        return value.astype(primals[0].dtype), slope.astype(primals[0].dtype) * tangents[0]

    return run


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """Defines the blocks of an encoder or decoder."""

    width: int
    num_heads: int
    mlp_width: int
    epsilon: float = 1e-6  # of the norms
    activation: str = "gelu"
    qkv_bias: bool = True
    attention: str = "xla"
    dtype: str = "float32"  # the compute type: of products, and of what passes between layers
    qk_norm: bool = False  # LayerNorm of each head's queries and keys
    memory_width: int | None = None  # if set: cross-attention to tokens of this width
    # What the backward pass computes again instead of saving: True: all of a block; False: nothing; None: the MLP's
    # activation, as a CPU does it best.
    remat: bool | None = None
    unroll: int = 1  # blocks per iteration of the loop over depth


class LayerNorm(nnx.Module):
    """LayerNorm in float32; the variance is the mean squared deviation, since E[x^2] - E[x]^2 loses digits."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (width,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d] float32
        return normalize(x, self.epsilon, jnp.float32) * self.scale[...] + self.bias[...]


class PreNorm(LayerNorm):
    """A LayerNorm before linear layers, which apply its scale and bias (`platform.linear`)."""

    def __call__(self, x: jax.Array) -> Normed:
        return Normed(normalize(x, self.epsilon, x.dtype), self.scale[...], self.bias[...])


class HeadNorm(nnx.Module):
    """LayerNorm over each head's width, with one scale for all heads (Dehghani et al. 2023, arXiv 2302.05442)."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon, self.scale = epsilon, nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, h, d] float32 -> [b, n, h, d] float32
        return normalize(x, self.epsilon, jnp.float32) * self.scale[...]


def normalize(x: jax.Array, epsilon: float, dtype: jnp.dtype) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) over the last axis, computed in float32, in `dtype`.

    Its derivative keeps only x or, of a narrower type than float32, only the result.
    """
    if x.dtype == jnp.float32:
        return recomputed(lambda x: _normalize(x, epsilon)[0])(x).astype(dtype)
    return _normalize_narrow(x, epsilon, dtype)


def _normalize(x, epsilon):
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _normalize_narrow(x, epsilon, dtype):
    return _normalize(x, epsilon)[0].astype(dtype)


@_normalize_narrow.defjvp
def _normalize_tangent(epsilon, dtype, primals, tangents):
    normed, inverse = _normalize(primals[0], epsilon)
    normed = normed.astype(dtype)
    return normed, _tangent_of_normed(normed, inverse, tangents[0]).astype(dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _tangent_of_normed(normed, inverse, of_x):
    normed, of_x = normed.astype(jnp.float32), of_x.astype(jnp.float32) * inverse
    return of_x - jnp.mean(of_x, axis=-1, keepdims=True) - normed * jnp.mean(normed * of_x, axis=-1, keepdims=True)


class Linear(nnx.Module):
    """A linear layer with products in `dtype` and a kernel [inputs, *outputs], Xavier-uniform as one matrix."""

    def __init__(
        self,
        inputs: int,
        *outputs: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        bias_init=nnx.initializers.zeros,
        use_bias: bool = True,
    ):
        self.dtype = dtype
        kernel = nnx.initializers.xavier_uniform()(rngs.params(), (inputs, math.prod(outputs)), jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(inputs, *outputs))
        self.bias = nnx.Param(bias_init(rngs.params(), outputs, jnp.float32)) if use_bias else None

    def __call__(self, x: jax.Array | Normed) -> jax.Array:
        """[..., inputs] -> [..., o] of the compute type, o the product of `outputs`."""
        return linear(x, self.kernel[...], None if self.bias is None else self.bias[...], self.dtype)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them; in MAE the exact GELU."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.config, dtype = config, jnp.dtype(config.dtype)
        self.fc1 = Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Normed) -> jax.Array:  # [b, n, d] -> [b, n, d]
        activation, x = ACTIVATIONS[self.config.activation], self.fc1(x)
        if self.config.remat is not None:
            return self.fc2(of_each_value(activation)(x))
        # Computes the activation again, for the kernel's gradient and for its own, each when it is needed.
        activate = jax.checkpoint(lambda x: activation(x.astype(jnp.float32)).astype(x.dtype))
        return jax.checkpoint(lambda x, project: project(activate(x)))(x, self.fc2)


class Attention(nnx.Module):
    """Self-attention with one kernel [D, 3, D] for q, k and v; with `config.memory_width`, cross-attention."""

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
        self,
        x: Normed,
        memory: jax.Array | None = None,
        weights: bool = False,
        count: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """[b, n, d], memory [b, m, memory_width] -> [b, n, d], and with `weights` the weights [b, h, n, n or m].

        `count` [b]: only the first so many of x, or of the memory, are attended to.
        """
        head_width = self.config.width // self.config.num_heads
        if memory is None:
            q, k, v = jnp.split(self.qkv(x), 3, axis=-1)  # the gradient is one join, not a sum
        else:
            q = self.q(x)
            k, v = jnp.split(self.kv(memory), 2, axis=-1)
        q, k, v = (rearrange(x, "b n (h d) -> b n h d", d=head_width) for x in (q, k, v))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q * head_width**-0.5  # fewer numbers than the logits
        q, k, v = (x.astype(self.dtype) for x in (q, k, v))
        attended = attention(q, k, v, self.config.attention, count)
        # The weights are computed again, so that the result is the same with and without them.
        update = self.out(rearrange(attended, "b n h d -> b n (h d)"))
        return update, attention_weights(q, k, count) if weights else None
