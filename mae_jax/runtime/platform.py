"""What platforms need: matrix products and attention, chosen by `jax.lax.platform_dependent`, and memory.

Precision: parameters, their gradients and the optimizer are float32, as are statistics of norms, softmax, the loss, and
sums of parameters' gradients over tokens, parts of a batch and devices. Matrix products take operands of the compute
type (`model.dtype`); their sums are float32 in the hardware. What passes from layer to layer, and what is kept of it
for the backward pass, has the compute type: bfloat16 on chips that have it, so that a step moves half the bytes.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mae_jax.runtime.sharding import axes_of, sum_of_parts

CPU_GROUPS = 4  # more compile longer and are no faster on two cores
PALLAS_HEADS = range(16, 129)  # widths: products have at least 16, and shared memory holds blocks of 128
WORTH_GROUPS = 2**25  # multiplications in one of attention's products


class Normed(NamedTuple):
    """x * scale + bias, not computed: `linear` folds scale [d] and bias [d] into its kernel."""

    x: jax.Array  # [..., d], with mean 0 and variance 1
    scale: jax.Array
    bias: jax.Array


def recomputed(fn: Callable, undifferentiated: Callable | None = None) -> Callable:
    """fn of arrays, whose backward pass keeps only the arguments and computes the rest again.

    On a CPU, where memory is slow, a barrier keeps XLA from merging both computations; elsewhere XLA may.
    `undifferentiated`: what is computed where there is no backward pass, if the same has a faster way.
    """
    run = jax.custom_jvp(undifferentiated or fn)

    @functools.partial(run.defjvp, symbolic_zeros=True)
    def tangent(primals, tangents):
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, jax.custom_derivatives.SymbolicZero)]

        def again(primals, tangents):
            primals = _apart_on_cpu(primals)

            def fn_of_moving(*values):
                return fn(*(values[moving.index(i)] if i in moving else x for i, x in enumerate(primals)))

            return jax.jvp(fn_of_moving, [primals[i] for i in moving], tangents)[1]

        return fn(*primals), jax.checkpoint(again, prevent_cse=False)(primals, [tangents[i] for i in moving])

    return run


def _apart_on_cpu(arrays):
    def apart(x):
        return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)

    if axes_of(("fsdp",)):  # loops need no barrier, and gathered parameters would be saved as its results
        return list(arrays)
    return [apart(x) for x in arrays]  # one barrier for all would let them vary over the same axes of a mesh


def linear(x: jax.Array | Normed, kernel: jax.Array, bias: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x [..., i] times kernel [i, *outputs], plus bias [*outputs]: [..., o] of `dtype`, o the product of the outputs.

    The gradients of a folded scale and bias are sums over the kernel, not over all tokens.
    """
    kernel, bias = kernel.reshape(len(kernel), -1), () if bias is None else (bias.reshape(-1),)
    if not isinstance(x, Normed):
        return _project(x, kernel, *bias, dtype=dtype)
    # A loop would save each block's folded kernel. Without gradients, to fold it is mere work.
    normed, scaled = (functools.partial(fn, dtype=dtype) for fn in (_project_normed, _project_scaled))
    return recomputed(normed, scaled)(*x, kernel, *bias)


def _project_scaled(x, scale, shift, kernel, *bias, dtype):
    return _project(x * scale + shift, kernel, *bias, dtype=dtype)


def _project_normed(x, scale, shift, kernel, bias=0, *, dtype):
    bias = bias + jnp.dot(shift, kernel, precision="highest")
    return _project(x, scale[:, None] * kernel, bias, dtype=dtype)


def _project(x, kernel, bias=None, *, dtype):
    product = sum_of_parts(matmul(x.astype(dtype), kernel.astype(dtype)).astype(jnp.float32), x)
    if bias is not None:  # in float32, so that its gradient is a float32 sum over all tokens
        product = product + bias
    return product.astype(dtype)


@jax.custom_jvp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., i] times kernel [i, o]: [..., o].

    The kernel's gradient is x^T times the result's gradient. On a CPU, XLA (JAX 0.10) has no fast product with a
    transposed operand and takes up to twice as long, so there an operand is transposed in memory.
    """
    return jnp.dot(x, kernel)


@functools.partial(matmul.defjvp, symbolic_zeros=True)
def _matmul_tangent(primals, tangents):
    (x, kernel), (of_x, of_kernel) = primals, tangents
    product, tangent = matmul(x, kernel), 0
    if not isinstance(of_x, jax.custom_derivatives.SymbolicZero):
        tangent = _tangent_times(of_x, kernel)
    if not isinstance(of_kernel, jax.custom_derivatives.SymbolicZero):
        tangent = tangent + _times_tangent(x, of_kernel)
    return product, tangent


# Transposed by JAX, both become the platform's fastest products; they save x and the kernel, not their transposes.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _tangent_times(of_x, kernel):
    return jax.lax.dot_general(of_x, kernel.T, (((of_x.ndim - 1,), (1,)), ((), ())))


@functools.partial(jax.checkpoint, prevent_cse=False)
def _times_tangent(x, of_kernel):
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.platform_dependent(rows, of_kernel, cpu=_transposed_in_memory, default=jnp.dot)
    return product.reshape(*x.shape[:-1], -1)


def _transposed_in_memory(x, y):
    """x [rows, m] times y [m, n], transposing in memory either x, or y and the product, whichever is smaller."""
    (rows, m), n = x.shape, y.shape[1]  # the barriers keep XLA from fusing the transposes into the product
    if rows * m > rows * n + m * n:
        product = jax.lax.dot_general(jax.lax.optimization_barrier(y.T), x, (((1,), (1,)), ((), ())))
        return jax.lax.optimization_barrier(product).T
    return jax.lax.dot_general(jax.lax.optimization_barrier(x.T), y, (((0,), (0,)), ((), ())))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, kind: str = "xla", count: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T) v of scaled queries [b, n, h, d], keys and values [b, m, h, d]: [b, n, h, d].

    `kind`: "xla"; "cudnn" and "pallas" keep no weights (NVIDIA GPUs, bfloat16; heads as wide as `PALLAS_HEADS`).
    `count` [b]: only the first so many keys are attended to, whatever the kind.
    """
    if count is not None:
        return _attend(q, k, v, count)[0]
    if kind == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")
    if kind == "pallas":
        from mae_jax.runtime.gpu_attention import fused_attention  # Pallas takes half a second to import

        return fused_attention(q, k, v)
    return _xla_attention(q, k, v)


@jax.custom_jvp
def _xla_attention(q, k, v):
    """The weights [b, h, n, m] are saved once, in q's dtype (`jax.nn.dot_product_attention` does twice, in float32)."""
    return _on_platform(_attend, q, k, v)[0]


@_xla_attention.defjvp
def _attention_tangent(primals, tangents):
    attended, weights = _on_platform(_attend, *primals)
    tangent = jax.checkpoint(functools.partial(_on_platform, _attend_tangent), prevent_cse=False)
    return attended, tangent(*primals, weights, *tangents)


def attention_weights(q: jax.Array, k: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T) in float32, [b, h, n, m], of scaled queries [b, n, h, d] and keys [b, m, h, d].

    `count` [b]: of the first so many keys only; the others get 0.
    """
    logits = jnp.einsum("xqd,xkd->xqk", _by_head(q), _by_head(k), preferred_element_type=jnp.float32)
    if count is not None:
        counts = jnp.repeat(count, q.shape[2])[:, None, None]
        logits = jnp.where(jnp.arange(k.shape[1]) < counts, logits, -jnp.inf)
    return rearrange(jax.nn.softmax(logits, axis=-1), "(b h) n m -> b h n m", b=len(q))


def _on_platform(fn, q, k, *others):
    """fn; on a CPU, where XLA computes a batched product on one core, large inputs are split into groups."""
    if q.size * k.shape[1] < WORTH_GROUPS:
        return fn(q, k, *others)
    return jax.lax.platform_dependent(q, k, *others, cpu=functools.partial(_in_groups, fn), default=fn)


def _in_groups(fn, *arrays):
    parts = zip(*(jnp.array_split(x, min(CPU_GROUPS, len(x))) for x in arrays), strict=True)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *[fn(*part) for part in parts])


def _by_head(x):  # products with one batch axis are fastest
    return rearrange(x, "b n h d -> (b h) n d")


def _attend(q, k, v, count=None):
    weights = attention_weights(q, k, count).astype(q.dtype)
    attended = jnp.einsum("xqk,xkd->xqd", weights.reshape(-1, *weights.shape[2:]), _by_head(v))
    return rearrange(attended, "(b h) n d -> b n h d", b=len(q)), weights


def _attend_tangent(q, k, v, weights, of_q, of_k, of_v):
    """The derivative of `_attend`, linear in the last three arguments."""
    q, k, v, of_q, of_k, of_v = map(_by_head, (q, k, v, of_q, of_k, of_v))
    b, weights = len(weights), weights.reshape(-1, *weights.shape[2:])
    of_logits = jnp.einsum("xqd,xkd->xqk", of_q, k) + jnp.einsum("xqd,xkd->xqk", q, of_k)
    exact = weights.astype(jnp.float32)
    weighted = exact * of_logits.astype(jnp.float32)
    of_weights = weighted - exact * jnp.sum(weighted, axis=-1, keepdims=True)
    tangent = jnp.einsum("xqk,xkd->xqd", of_weights.astype(q.dtype), v) + jnp.einsum("xqk,xkd->xqd", weights, of_v)
    return rearrange(tangent, "(b h) n d -> b n h d", b=b)


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory instead of returning it to the system; False without glibc.

    On a CPU, to map and clear the pages of activations again takes a fifth to half of a step. Only the first thread
    keeps arrays larger than a thread's heap, so steps run there (`mesh.prepare_cpu`).
    """
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # mallopt(3)
    # A thread returns an empty heap, unless less than the pad would be left (HEAP_MAX_SIZE in malloc/arena.c).
    options = ((mmap_max, 0), (trim_threshold, -1), (top_pad, 64 << 20))
    try:
        return all([ctypes.CDLL(None).mallopt(option, value) == 1 for option, value in options])
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
