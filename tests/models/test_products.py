"""Products and attention with gradients of their own, against NumPy and JAX's own attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.models.attention import attend
from mae_jax.models.products import matmul


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
        return jax.nn.dot_product_attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]

    arguments = [value.astype(dtype) for value in (q, k, v)]
    found = jax.grad(loss(attend), (0, 1, 2))(*arguments)
    expected = jax.grad(loss(jax_s_own), (0, 1, 2))(*(value.astype(jnp.float32) for value in arguments))
    np.testing.assert_allclose(attend(*arguments).astype(jnp.float32), jax_s_own(q, k, v), atol=tolerance)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=tolerance * float(jnp.abs(other).max()))
