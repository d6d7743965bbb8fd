"""Products and attention with gradients of their own, against NumPy and JAX's own attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_jax.models import attention
from mae_jax.models.attention import attend, attend_in_groups
from mae_jax.models.layers import LayerNorm, Linear
from mae_jax.runtime.products import matmul


# The kernel is wide, tall (where the other operand is transposed), or has more numbers than the rows.
@pytest.mark.parametrize("shape, outputs", [((3, 7, 4), 9), ((5, 40, 12), 3), ((2, 12), 5)])
def test_a_product_and_both_gradients_are_those_of_numpy(shape, outputs):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal(shape), rng.standard_normal((shape[-1], outputs))
    weight = rng.standard_normal((*shape[:-1], outputs))
    arguments = [jnp.asarray(value, jnp.float32) for value in (x, kernel)]
    product, gradients = jax.vjp(matmul, *arguments)
    np.testing.assert_allclose(product, x @ kernel, atol=1e-5)
    of_x, of_kernel = gradients(jnp.asarray(weight, jnp.float32))
    np.testing.assert_allclose(of_x, weight @ kernel.T, atol=1e-5)
    expected = x.reshape(-1, shape[-1]).T @ weight.reshape(-1, outputs)
    np.testing.assert_allclose(of_kernel, expected, atol=1e-4)  # sums of 200 terms


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 4e-2)])
def test_attention_and_its_gradients_are_those_of_jax_s_own(dtype, tolerance):
    keys = jax.random.split(jax.random.key(0), 4)
    q, weight = (jax.random.normal(key, (6, 5, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (6, 9, 8)) for key in keys[2:])

    def loss(attention):
        return lambda *arguments: jnp.sum(attention(*arguments).astype(jnp.float32) * weight)

    def jax_s_own(q, k, v):  # [x, n, d] as x images of one head
        return jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None], scale=1.0)[:, :, 0]

    q = q * 8**-0.5
    arguments = [value.astype(dtype) for value in (q, k, v)]
    found = jax.grad(loss(attend), (0, 1, 2))(*arguments)
    expected = jax.grad(loss(jax_s_own), (0, 1, 2))(*(value.astype(jnp.float32) for value in arguments))
    np.testing.assert_allclose(attend(*arguments).astype(jnp.float32), jax_s_own(q, k, v), atol=tolerance)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=tolerance * float(jnp.abs(other).max()))


@pytest.mark.parametrize("images", [1, 3, 6])
def test_groups_of_images_attend_as_all_of_them_do(monkeypatch, images):
    q, k, v, weight = jax.random.normal(jax.random.key(0), (4, images, 5, 2, 8))

    def value_and_gradients(worth_groups):
        monkeypatch.setattr(attention, "WORTH_GROUPS", worth_groups)
        attended, gradients = jax.vjp(attend_in_groups, q, k, v)
        return attended, *gradients(weight)

    def groups():
        return str(jax.make_jaxpr(lambda *arguments: attend_in_groups(*arguments))(q, k, v)).count("custom_vjp_call")

    whole, one = value_and_gradients(2**60), groups()
    grouped, several = value_and_gradients(0), groups()
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(found, expected, atol=1e-6), grouped, whole)
    assert (one, several) == (1, min(images, attention.CPU_GROUPS))


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_norm_that_is_taken_into_a_layers_kernel_has_the_values_and_gradients_of_one_before_it(use_bias):
    rngs = nnx.Rngs(0)
    norm, layer = LayerNorm(12, 1e-6, rngs=rngs), Linear(12, 3, 4, dtype=jnp.float32, use_bias=use_bias, rngs=rngs)
    norm.scale[...], norm.bias[...] = jax.random.normal(jax.random.key(0), (2, 12))  # some are near 0, or negative
    x = 3 + 2 * jax.random.normal(jax.random.key(1), (5, 7, 12))
    weight = jax.random.normal(jax.random.key(2), (5, 7, 3, 4))

    def loss(apply):
        return jax.value_and_grad(lambda modules, x: jnp.sum(apply(*modules, x) * weight), (0, 1))

    found = loss(lambda norm, layer, x: layer(x, norm))((norm, layer), x)
    expected = loss(lambda norm, layer, x: layer(norm(x)))((norm, layer), x)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5), found, expected)
