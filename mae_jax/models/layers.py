"""The layers of Transformer blocks: norms, linear layers, MLP and attention."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mae_jax.runtime.errors import UserError
from mae_jax.runtime.platform import Normed, attention, attention_weights, linear


@jax.custom_jvp
def _erf(x: jax.Array) -> jax.Array:
    return jax.lax.erf(x)


# JAX's own rule fails on a mesh in 0.12.0 (in the primitive `polynomial`).
_erf.defjvps(lambda tangent, value, x: 2 / math.sqrt(math.pi) * (tangent * jnp.exp(-jnp.square(x))))


@jax.checkpoint  # saves only x for the backward pass; JAX would save four arrays of its size
def exact_gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x) with erf, in float32 (`jax.nn.gelu(approximate=False)` uses the costlier erfc)."""
    x = x.astype(jnp.float32)
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
    dtype: str = "float32"  # of the matrix products
    qk_norm: bool = False  # LayerNorm of each head's queries and keys
    memory_width: int | None = None  # if set: cross-attention to tokens of this width
    remat: bool = False  # recompute each block in the backward pass instead of saving its activations
    unroll: int = 1  # blocks per iteration of the loop over depth


class LayerNorm(nnx.Module):
    """LayerNorm in float32; the variance is the mean squared deviation, since E[x^2] - E[x]^2 loses digits."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (width,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d] float32
        return _normalize_again(x, self.epsilon) * self.scale[...] + self.bias[...]


class PreNorm(LayerNorm):
    """A LayerNorm before linear layers, which apply its scale and bias (`platform.linear`)."""

    def __call__(self, x: jax.Array) -> Normed:
        return Normed(_normalize_again(x, self.epsilon), self.scale[...], self.bias[...])


class HeadNorm(nnx.Module):
    """LayerNorm over each head's width, with one scale for all heads (Dehghani et al. 2023, arXiv 2302.05442)."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon, self.scale = epsilon, nnx.Param(jnp.ones(width))

    def __call__(self, x: jax.Array) -> jax.Array:  # [b, n, h, d] float32 -> [b, n, h, d] float32
        return _normalize(x, self.epsilon) * self.scale[...]


def _normalize(x: jax.Array, epsilon: float) -> jax.Array:
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)


_normalize_again = jax.checkpoint(_normalize, static_argnums=1)  # saves only x for the backward pass


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

    def __call__(self, x: jax.Array | Normed) -> jax.Array:  # [..., inputs] -> [..., *outputs] float32
        return linear(x, self.kernel[...], None if self.bias is None else self.bias[...], self.dtype)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them; in MAE the exact GELU."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.activation, dtype = config.activation, jnp.dtype(config.dtype)
        self.fc1 = Linear(config.width, config.mlp_width, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Normed) -> jax.Array:  # [b, n, d] -> [b, n, d]
        activate = ACTIVATIONS[self.activation]
        # Recomputes the activation's result instead of saving it.
        return jax.checkpoint(lambda x, project: project(activate(x)))(self.fc1(x), self.fc2)


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
                raise UserError("model.attention=cudnn needs an NVIDIA GPU, but JAX has none: set model.attention=xla")
            attended = jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")
        else:
            attended = attention(q, k, v)
        # The weights are computed again, so that the result is the same with and without them.
        return self.out(rearrange(attended, "b n h d -> b n (h d)")), attention_weights(q, k) if weights else None
