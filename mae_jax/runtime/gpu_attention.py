"""Attention for NVIDIA GPUs that keeps no weights: Pallas kernels after FlashAttention-2 (Dao 2023, arXiv 2307.08691).

`jax.experimental.pallas.ops.gpu.attention` takes only whole blocks of tokens, and no arrays that vary over a mesh.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

BLOCK = 64  # tokens; a sequence's last block is masked


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """softmax(q k^T) v of scaled queries [b, n, h, d], keys and values [b, m, h, d]: [b, n, h, d].

    Sums and the softmax are float32, operands of products have q's dtype. `interpret`: runs anywhere, slowly.
    """
    return _forward(q, k, v, interpret)[0]


def _forward(q, k, v, interpret):
    log_sums = jax.eval_shape(lambda q: jnp.swapaxes(q[..., 0], 1, 2).astype(jnp.float32), q)  # [b, h, n]
    attended, log_sums = _call(
        _forward_kernel, "attention", q, k, pl.cdiv(q.shape[1], BLOCK), (q, k, v), (q, log_sums), 1, interpret
    )
    return attended, (q, k, v, attended, log_sums)


def _backward(interpret, kept, of_attended):
    q, k, v, attended, log_sums = kept
    blocks = pl.cdiv(max(q.shape[1], k.shape[1]), BLOCK)
    inputs = q, k, v, attended, of_attended, log_sums
    return tuple(_call(_backward_kernel, "attention_gradient", q, k, blocks, inputs, (q, k, v), 0, interpret))


fused_attention.defvjp(_forward, _backward)


def _call(kernel, name, q, k, blocks, inputs, outputs, cut, interpret):
    """Runs a kernel for each image, head and block of tokens.

    It sees its block of outputs and of the first `cut` inputs, and all tokens of the other inputs.
    """
    width = pl.next_power_of_2(q.shape[-1])

    def spec(array, one_block):
        axis = 2 if array.ndim == 3 else 1  # of tokens
        tokens = BLOCK * (1 if one_block else pl.cdiv(array.shape[axis], BLOCK))
        if axis == 2:
            return pl.BlockSpec((None, None, tokens), lambda b, h, i: (b, h, i * one_block))
        return pl.BlockSpec((None, tokens, None, width), lambda b, h, i: (b, i * one_block, h, 0))

    return pl.pallas_call(
        functools.partial(kernel, n=q.shape[1], m=k.shape[1], width=q.shape[-1]),
        grid=(q.shape[0], q.shape[2], blocks),
        in_specs=[spec(array, number < cut) for number, array in enumerate(inputs)],
        out_specs=[spec(array, True) for array in outputs],
        out_shape=[jax.ShapeDtypeStruct.like(array) for array in outputs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=name,
    )(*inputs)


def _tokens(block):
    return block * BLOCK + jnp.arange(BLOCK)


def _mask(ref, block, length, width):
    """Which values of a block of [length] or [length, width] exist."""
    rows = _tokens(block) < length
    return rows if len(ref.shape) == 1 else rows[:, None] & (jnp.arange(ref.shape[1]) < width)


def _load(ref, block, length, width):
    """A block of an array that the kernel sees as a whole, with zeros in place of what does not exist."""
    mask = _mask(ref, block, length, width)
    return triton.load(ref.at[pl.ds(block * BLOCK, BLOCK)], mask=mask, other=0.0)


def _store(ref, values, block, length, width):
    triton.store(ref, values.astype(ref.dtype), mask=_mask(ref, block, length, width))


def _dot(x, y):
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _forward_kernel(q_ref, k_ref, v_ref, attended_ref, log_sums_ref, *, n, m, width):
    block = pl.program_id(2)
    q = triton.load(q_ref, mask=_mask(q_ref, block, n, width), other=0.0)

    def add_keys(j, carry):
        attended, greatest, total = carry
        k, v = _load(k_ref, j, m, width), _load(v_ref, j, m, width)
        logits = jnp.where(_tokens(j) < m, _dot(q, k.T), -jnp.inf)
        greater = jnp.maximum(greatest, jnp.max(logits, axis=1))
        weights, shrunk = jnp.exp(logits - greater[:, None]), jnp.exp(greatest - greater)
        attended = attended * shrunk[:, None] + _dot(weights.astype(v.dtype), v)
        return attended, greater, total * shrunk + jnp.sum(weights, axis=1)

    start = jnp.zeros(q.shape, jnp.float32), jnp.full(BLOCK, -jnp.inf), jnp.zeros(BLOCK)
    attended, greatest, total = jax.lax.fori_loop(0, pl.cdiv(m, BLOCK), add_keys, start)
    _store(attended_ref, attended / total[:, None], block, n, width)
    _store(log_sums_ref, greatest + jnp.log(total), block, n, width)


def _backward_kernel(
    q_ref, k_ref, v_ref, attended_ref, of_attended_ref, log_sums_ref, of_q_ref, of_k_ref, of_v_ref, *, n, m, width
):
    block = pl.program_id(2)

    def queries(i):
        """Block i of queries and of gradients, log sums, and the products of outputs and their gradients."""
        q, attended, of_attended, log_sums = (
            _load(ref, i, n, width) for ref in (q_ref, attended_ref, of_attended_ref, log_sums_ref)
        )
        return q, of_attended, log_sums, jnp.sum(attended.astype(jnp.float32) * of_attended, axis=1)

    def keys(j):
        return j, _load(k_ref, j, m, width), _load(v_ref, j, m, width)

    def weights_and_gradients(q, of_attended, log_sums, products, j, k, v):
        weights = jnp.where(_tokens(j) < m, jnp.exp(_dot(q, k.T) - log_sums[:, None]), 0.0)
        of_logits = weights * (_dot(of_attended, v.T) - products[:, None])
        return weights.astype(q.dtype), of_logits.astype(q.dtype)

    def add_queries(i, carry):
        of_k, of_v = carry
        q, of_attended, *rest = queries(i)
        weights, of_logits = weights_and_gradients(q, of_attended, *rest, *own_keys)
        return of_k + _dot(of_logits.T, q), of_v + _dot(weights.T, of_attended)

    def add_keys(j, of_q):
        _, k, v = keys(j)
        return of_q + _dot(weights_and_gradients(*own_queries, j, k, v)[1], k)

    zeros = jnp.zeros((BLOCK, q_ref.shape[1]), jnp.float32)
    own_keys = keys(block)
    of_k, of_v = jax.lax.fori_loop(0, pl.cdiv(n, BLOCK), add_queries, (zeros, zeros))
    _store(of_k_ref, of_k, block, m, width)
    _store(of_v_ref, of_v, block, m, width)
    own_queries = queries(block)
    _store(of_q_ref, jax.lax.fori_loop(0, pl.cdiv(m, BLOCK), add_keys, zeros), block, n, width)
