"""What a platform needs: products, attention and norms with their derivatives, and memory that is kept."""

import ctypes
import functools
import os
import platform as host
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mae_jax.models.layers import LayerNorm, Linear, PreNorm
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.runtime import platform
from mae_jax.runtime.platform import attention, keep_freed_memory, matmul


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
@pytest.mark.parametrize("worth_groups", [0, 2**60], ids=["in groups", "at once"])
def test_attention_and_its_gradients_are_those_of_jax_s_own(monkeypatch, worth_groups, dtype, tolerance):
    monkeypatch.setattr(platform, "WORTH_GROUPS", worth_groups)
    keys = jax.random.split(jax.random.key(0), 4)
    q, weight = (jax.random.normal(key, (6, 5, 2, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (6, 9, 2, 8)) for key in keys[2:])

    def loss(attention):
        return lambda *arguments: jnp.sum(attention(*arguments).astype(jnp.float32) * weight)

    def jax_s_own(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=1.0)

    q = q * 8**-0.5
    arguments = [value.astype(dtype) for value in (q, k, v)]
    found = jax.jit(jax.grad(loss(attention), (0, 1, 2)))(*arguments)
    expected = jax.jit(jax.grad(loss(jax_s_own), (0, 1, 2)))(*(value.astype(jnp.float32) for value in arguments))
    np.testing.assert_allclose(attention(*arguments).astype(jnp.float32), jax_s_own(q, k, v), atol=tolerance)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=tolerance * float(jnp.abs(other).max()))


def test_on_a_cpu_images_attend_in_groups_and_elsewhere_at_once(monkeypatch):
    monkeypatch.setattr(platform, "WORTH_GROUPS", 0)
    q = jnp.ones((6, 5, 2, 8))
    lowered = jax.jit(lambda q: attention(q, q, q)).trace(q)
    products = [lowered.lower(lowering_platforms=(name,)).as_text().count("dot_general") for name in ("cpu", "tpu")]
    assert products == [2 * platform.CPU_GROUPS, 2]


def test_forward_mode_derivatives_are_those_of_reverse_mode(monkeypatch):
    monkeypatch.setattr(platform, "WORTH_GROUPS", 0)
    config = MAEConfig(8, 4, 1, 8, 1, 2, 4.0, 8, 1, 2, 0.5)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))

    def loss(params):
        return make_bind(config)(params)(images, key=jax.random.key(2)).loss

    @jax.jit
    def slopes():
        params = init_params(config, jax.random.key(0))
        direction = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)
        products = jax.tree.map(lambda g, d: jnp.sum(g * d), jax.grad(loss)(params), direction)
        return jax.jvp(loss, (params,), (direction,))[1], sum(jax.tree.leaves(products))

    forward, reverse = slopes()
    assert float(forward) == pytest.approx(float(reverse), rel=1e-4)


def test_derivatives_of_each_example_can_be_mapped():
    x, kernel = jax.random.normal(jax.random.key(0), (3, 4, 5)), jax.random.normal(jax.random.key(1), (5, 2))
    found = jax.vmap(jax.grad(lambda x, kernel: jnp.sum(matmul(x, kernel) ** 2), 1), (0, None))(x, kernel)
    expected = jnp.einsum("bni,bno->bio", x, 2 * x @ kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_norm_that_is_taken_into_a_layers_kernel_has_the_values_and_gradients_of_one_before_it(use_bias):
    rngs = nnx.Rngs(0)
    norm, folded = LayerNorm(12, 1e-6, rngs=rngs), PreNorm(12, 1e-6, rngs=rngs)
    layer = Linear(12, 3, 4, dtype=jnp.float32, use_bias=use_bias, rngs=rngs)
    for each in (norm, folded):
        each.scale[...], each.bias[...] = jax.random.normal(jax.random.key(0), (2, 12))  # some near 0, or negative
    x = 3 + 2 * jax.random.normal(jax.random.key(1), (5, 7, 12))
    weight = jax.random.normal(jax.random.key(2), (5, 7, 12))

    def loss(apply):
        return jax.jit(jax.value_and_grad(lambda modules, x: jnp.sum(apply(*modules, x) * weight), (0, 1)))

    found, expected = (
        jax.tree.leaves(loss(lambda norm, layer, x: layer(norm(x)))((each, layer), x)) for each in (folded, norm)
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


# Page faults of arrays that are made, filled and freed once more, when all has settled: glibc before 2.38 asks for some
# bytes more than it gives out where memory must be aligned, as XLA's must, and so may find what was freed too small
# several times, until the small pieces beside it are free as well.
PROGRAM = """
import resource, statistics
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp, numpy as np
from ml_collections import ConfigDict
from mae_jax.runtime.platform import keep_freed_memory
from mae_jax.runtime.mesh import prepare_cpu

def fill(*mebibytes):
    [np.ones(size << 20, np.uint8) for size in mebibytes]

if {keeps}:
    assert keep_freed_memory()
    prepare_cpu(ConfigDict(dict(cpu_devices=1)))
for before, run in {cases}:
    exec(before)
    faults = []
    for _ in range(24):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        exec(run)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(int(statistics.median(faults[8:])))
"""
CASES = {
    "first thread": ("", "fill(96)"),
    # Each takes most of a heap of this thread's.
    "another thread": ("thread = ThreadPoolExecutor(1)", "thread.submit(fill, 48, 48).result()"),
    "compiled": ("program = jax.jit(lambda x: x[:, None] + x); x = jnp.ones(5017)", "program(x).block_until_ready()"),
}


@functools.cache
def faults(keeps: bool) -> dict[str, int]:
    """The page faults of each case."""
    program = PROGRAM.format(keeps=keeps, cases=list(CASES.values()))
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    return dict(zip(CASES, map(int, done.stdout.split()), strict=True))


@pytest.mark.skipif(host.libc_ver()[0] != "glibc", reason="other allocators are left alone")
@pytest.mark.parametrize("case", CASES)
def test_memory_that_was_freed_is_found_again_without_a_fault(case):
    pages = (96 << 20) // 4096
    assert faults(True)[case] < pages / 100  # a thread's own stack and such
    assert faults(False)[case] > pages / 600  # also if the kernel gives pages of 2 MiB


def test_where_the_c_library_has_no_such_setting_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
