"""The layers of Transformer blocks."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mae_jax.runtime.platform import Normed, linear

xavier_uniform = nnx.initializers.xavier_uniform()


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


class LayerNorm(nnx.Module):
    """LayerNorm in float32; the variance is the mean squared deviation, since E[x^2] - E[x]^2 loses digits."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (width,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d] float32
        return _normalize(x, self.epsilon) * self.scale[...] + self.bias[...]


class PreNorm(LayerNorm):
    """A LayerNorm before linear layers, which apply its scale and bias (`platform.linear`)."""

    def __call__(self, x: jax.Array) -> Normed:
        return Normed(_normalize(x, self.epsilon), self.scale[...], self.bias[...])


@functools.partial(jax.checkpoint, static_argnums=1)  # saves only x for the backward pass
def _normalize(x: jax.Array, epsilon: float) -> jax.Array:
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)


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
        kernel = xavier_uniform(rngs.params(), (inputs, math.prod(outputs)), jnp.float32)
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
        return _activate_and_project(ACTIVATIONS[self.activation], self.fc1(x), self.fc2)


@functools.partial(jax.checkpoint, static_argnums=0)  # recomputes the activation's result instead of saving it
def _activate_and_project(activation, x: jax.Array, project: Linear) -> jax.Array:
    return project(activation(x))
