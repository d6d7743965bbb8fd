"""The kernels for GPUs, interpreted on a CPU."""

import jax
import numpy as np
import pytest

from mae_jax.runtime.gpu_attention import fused_attention


# Less than a block, more than one, cross-attention to fewer and to more tokens; widths that are no power of two.
@pytest.mark.parametrize(("n", "m", "width"), [(5, 5, 16), (70, 70, 20), (70, 9, 32), (3, 130, 16)])
def test_the_kernel_and_its_gradients_are_those_of_jax_s_own_attention(n, m, width):
    keys = jax.random.split(jax.random.key(0), 4)
    q, weight = (jax.random.normal(key, (2, n, 2, width)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, m, 2, width)) for key in keys[2:])

    def run(attention):
        values, pull = jax.vjp(attention, q * width**-0.5, k, v)
        return values, *pull(weight)

    found = run(lambda *heads: fused_attention(*heads, True))
    expected = run(lambda *heads: jax.nn.dot_product_attention(*heads, scale=1.0))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=1e-5)  # float32 sums in another order
