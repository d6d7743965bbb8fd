"""The layers that Transformer blocks are made of."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mae_jax.runtime.products import matmul
from mae_jax.runtime.sharding import from_rows, to_columns

xavier_uniform = nnx.initializers.xavier_uniform()


@jax.checkpoint  # keeps x alone for the backward pass, where JAX would keep four arrays of its size
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
    qk_norm: bool = False  # LayerNorm of each head's queries and keys
    memory_width: int | None = None  # if set, the tokens attend to others of this width, and not to one another


class LayerNorm(nnx.Module):
    """A LayerNorm in float32, whose variance is the mean of squared deviations (E[x^2] - E[x]^2 loses digits)."""

    def __init__(self, width: int, epsilon: float, *, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (width,), jnp.float32))
        self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:  # [..., d] -> [..., d] float32
        return self.normalize(x) * self.scale[...] + self.bias[...]

    def normalize(self, x: jax.Array) -> jax.Array:
        """[..., d] to [..., d] float32 of mean 0 and variance 1: what `scale` and `bias` are applied to."""
        return _normalize(x, self.epsilon)


@functools.partial(jax.checkpoint, static_argnums=1)  # keeps x alone for the backward pass
def _normalize(x: jax.Array, epsilon: float) -> jax.Array:
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)


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

    def __call__(self, x: jax.Array, norm: LayerNorm | None = None) -> jax.Array:
        """Maps x [..., inputs] to [..., *outputs].

        Args:
          norm: what x is normed by before. Its scale and bias are taken into the kernel and the bias: so their
            gradients are sums over the kernel's numbers, instead of sums over all tokens of a batch.
        """
        return self._project(x) if norm is None else _scale_and_project(norm.normalize(x), norm, self)

    def _project(self, x: jax.Array, norm: LayerNorm | None = None) -> jax.Array:  # x is normalised already
        kernel = self.kernel[...].reshape(self.kernel.shape[0], -1)
        bias = None if self.bias is None else self.bias[...].reshape(-1)
        if norm is not None:
            scale, shift = norm.scale[...], norm.bias[...]
            if self.split == "columns":
                scale, shift = to_columns(scale), to_columns(shift)
            shift = jnp.dot(shift, kernel, precision="highest")
            bias = shift if bias is None else bias + shift
            kernel = scale[:, None] * kernel
        if self.split == "columns":
            x = to_columns(x)
        product = matmul(x.astype(self.dtype), kernel.astype(self.dtype)).astype(jnp.float32)
        if self.split == "rows":
            product = from_rows(product)
        if bias is not None:
            product = product + bias
        return product.reshape(*x.shape[:-1], *self.kernel.shape[1:])


@jax.checkpoint  # the kernel times the norm's scale is made again: a loop would keep one of each block
def _scale_and_project(x: jax.Array, norm: LayerNorm, project: Linear) -> jax.Array:
    return project._project(x, norm)


class Mlp(nnx.Module):
    """Two linear layers with an activation between them; in MAE the exact (erf) GELU."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        self.activation, dtype = config.activation, jnp.dtype(config.dtype)
        self.fc1 = Linear(config.width, config.mlp_width, dtype=dtype, split="columns", rngs=rngs)
        self.fc2 = Linear(config.mlp_width, config.width, dtype=dtype, split="rows", rngs=rngs)

    def __call__(self, x: jax.Array, norm: LayerNorm) -> jax.Array:
        """Maps x [b, n, d], which is normed first, to [b, n, d]."""
        return _activate_and_project(ACTIVATIONS[self.activation], self.fc1(x, norm), self.fc2)


@functools.partial(jax.checkpoint, static_argnums=0)  # the activation's result is computed again, not kept
def _activate_and_project(activation, x: jax.Array, project: Linear) -> jax.Array:
    return project(activation(x))
