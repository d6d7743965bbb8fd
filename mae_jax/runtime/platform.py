"""What a CPU, GPU or TPU needs: matrix products, attention, and memory, each as the platform that runs it does it best.

The models call `linear` and `attention`; `jax.lax.platform_dependent` chooses by the platform that a program is
compiled for. A path of its own for GPUs or TPUs goes here.
"""

import ctypes
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from mae_jax.runtime.sharding import sum_of_parts

CPU_GROUPS = 4  # more take longer to compile, and are no faster on two cores
WORTH_GROUPS = 2**25  # multiplications in one of attention's products

# mallopt(3)
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST_HEAP = 64 << 20  # bytes; of a thread other than the first (HEAP_MAX_SIZE in glibc's malloc/arena.c)


class Normed(NamedTuple):
    """x * scale + bias, not yet computed: `linear` folds scale [d] and bias [d] into its kernel."""

    x: jax.Array  # [..., d], of mean 0 and variance 1
    scale: jax.Array
    bias: jax.Array


def linear(x: jax.Array | Normed, kernel: jax.Array, bias: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x [..., i] times kernel [i, *outputs], plus bias [*outputs]: [..., *outputs].

    The product is in `dtype`; bias and result are float32. (A bias that is added in bfloat16 has a gradient that is a
    bfloat16 sum over all tokens of a batch.) The gradients of a folded norm's scale and bias are sums over the
    kernel's numbers, instead of sums over all tokens.
    """
    if isinstance(x, Normed):
        return _project_normed(x, kernel, bias, dtype)
    return _project(x, kernel.reshape(len(kernel), -1), bias, dtype, kernel.shape[1:])


@functools.partial(
    jax.checkpoint, static_argnums=3
)  # makes the folded kernel again: a loop would keep one of each block
def _project_normed(normed: Normed, kernel, bias, dtype):
    outputs, kernel = kernel.shape[1:], kernel.reshape(len(kernel), -1)
    shift = jnp.dot(normed.bias, kernel, precision="highest")
    bias = shift if bias is None else bias.reshape(-1) + shift
    return _project(normed.x, normed.scale[:, None] * kernel, bias, dtype, outputs)


def _project(x, kernel, bias, dtype, outputs):
    product = matmul(x.astype(dtype), kernel.astype(dtype)).astype(jnp.float32)
    product = sum_of_parts(product, x)
    if bias is not None:
        product = product + bias.reshape(-1)
    return product.reshape(*x.shape[:-1], *outputs)


@jax.custom_jvp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., i] times kernel [i, o]: [..., o].

    The gradient of the kernel is x^T times a gradient. XLA's fast products on a CPU (0.10) take no transposed operand,
    and left to itself it takes others that need up to twice the time; so there, something is transposed in memory.
    """
    return jnp.dot(x, kernel)


@functools.partial(matmul.defjvp, symbolic_zeros=True)
def _matmul_tangent(primals, tangents):
    (x, kernel), (of_x, of_kernel) = primals, tangents
    product, tangent = matmul(x, kernel), 0
    if _is_given(of_x):
        tangent = _tangent_times(of_x, kernel)
    if _is_given(of_kernel):
        tangent = tangent + _times_tangent(x, of_kernel)
    return product, tangent


def _is_given(tangent) -> bool:
    return not isinstance(tangent, jax.custom_derivatives.SymbolicZero)


# Both are written so that their transposes are the products that the platform does best, and so that x and the kernel
# are kept for the backward pass, and not their transposes.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _tangent_times(of_x, kernel):
    return jax.lax.dot_general(of_x, kernel.T, (((of_x.ndim - 1,), (1,)), ((), ())))


@functools.partial(jax.checkpoint, prevent_cse=False)
def _times_tangent(x, of_kernel):
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.platform_dependent(rows, of_kernel, cpu=_transposed_in_memory, default=jnp.dot)
    return product.reshape(*x.shape[:-1], -1)


def _transposed_in_memory(x, y):
    """x [rows, m] times y [m, n]; the transpose moves x, or a gradient and the result, whichever are fewer numbers.

    Without the barriers XLA would take the transposes into the product.
    """
    (rows, m), n = x.shape, y.shape[1]
    if rows * m > rows * n + m * n:
        product = jax.lax.dot_general(jax.lax.optimization_barrier(y.T), x, (((1,), (1,)), ((), ())))
        return jax.lax.optimization_barrier(product).T
    return jax.lax.dot_general(jax.lax.optimization_barrier(x.T), y, (((0,), (0,)), ((), ())))


@jax.custom_jvp
def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T) v of scaled queries [b, n, h, d], keys and values [b, m, h, d]: [b, n, h, d].

    Logits and softmax are float32. The weights [b, h, n, m] are kept for the backward pass once, in the type of q
    (`jax.nn.dot_product_attention` keeps them twice, in float32).
    """
    return _on_platform(_attend, q, k, v)[0]


@attention.defjvp
def _attention_tangent(primals, tangents):
    attended, weights = _on_platform(_attend, *primals)
    tangent = jax.checkpoint(functools.partial(_on_platform, _attend_tangent), prevent_cse=False)
    return attended, tangent(*primals, weights, *tangents)


def attention_weights(q: jax.Array, k: jax.Array) -> jax.Array:
    """softmax(q k^T) in float32, [b, h, n, m], of scaled queries [b, n, h, d] and keys [b, m, h, d]."""
    logits = jnp.einsum("xqd,xkd->xqk", _by_head(q), _by_head(k), preferred_element_type=jnp.float32)
    return rearrange(jax.nn.softmax(logits, axis=-1), "(b h) n m -> b h n m", b=len(q))


def _on_platform(fn, q, k, *others):
    """fn, on a CPU for a few groups of images if there is much to compute.

    There XLA (0.10) computes one product of many small matrices on one core, but several products side by side.
    """
    if q.size * k.shape[1] < WORTH_GROUPS:
        return fn(q, k, *others)
    return jax.lax.platform_dependent(q, k, *others, cpu=functools.partial(_in_groups, fn), default=fn)


def _in_groups(fn, *arrays):
    groups = min(CPU_GROUPS, len(arrays[0]))
    parts = zip(*(jnp.array_split(x, groups) for x in arrays), strict=True)
    return jax.tree.map(lambda *x: jnp.concatenate(x), *[fn(*part) for part in parts])


def _by_head(x):  # products with one batch axis are the fastest
    return rearrange(x, "b n h d -> (b h) n d")


def _attend(q, k, v):
    weights = attention_weights(q, k).astype(q.dtype)
    attended = jnp.einsum("xqk,xkd->xqd", weights.reshape(-1, *weights.shape[2:]), _by_head(v))
    return rearrange(attended, "(b h) n d -> b n h d", b=len(q)), weights


def _attend_tangent(q, k, v, weights, of_q, of_k, of_v):
    """The derivative of `_attend`, linear in the last three; JAX transposes it for the backward pass."""
    q, k, v, of_q, of_k, of_v = map(_by_head, (q, k, v, of_q, of_k, of_v))
    b, weights = len(weights), weights.reshape(-1, *weights.shape[2:])
    of_logits = jnp.einsum("xqd,xkd->xqk", of_q, k) + jnp.einsum("xqd,xkd->xqk", q, of_k)
    exact = weights.astype(jnp.float32)
    weighted = exact * of_logits.astype(jnp.float32)
    of_weights = weighted - exact * jnp.sum(weighted, axis=-1, keepdims=True)
    tangent = jnp.einsum("xqk,xkd->xqd", of_weights.astype(q.dtype), v) + jnp.einsum("xqk,xkd->xqd", weights, of_v)
    return rearrange(tangent, "(b h) n d -> b n h d", b=b)


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory for later arrays, instead of handing it back to the system; False without glibc.

    On a CPU, each training step takes gigabytes for activations and frees them. By default every such array is mapped
    anew, and the kernel has to find and clear each of its pages in every step, which costs a fifth to half of its time.
    Threads keep heaps of their own; what is larger than such a heap is kept in the first thread alone, where steps on
    a CPU therefore take their memory (`mesh.prepare_cpu`).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS, musl, Windows
        return False
    # A heap of a thread goes back when it is empty, unless less than _TOP_PAD would then be left to the thread.
    never = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _LARGEST_HEAP))
    return all([mallopt(option, value) == 1 for option, value in never])
