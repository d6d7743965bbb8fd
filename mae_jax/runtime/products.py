"""Matrix products whose gradients are products that each platform does well."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., inputs] times kernel [inputs, outputs], as `jnp.dot`.

    The gradient of the kernel is x^T times a gradient. XLA's fast products on a CPU (0.10) take no transposed operand,
    and left to itself it takes others that need up to twice the time; so there, something is transposed in memory.
    """
    return jnp.dot(x, kernel)


def _forward(x, kernel):
    return jnp.dot(x, kernel), (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved
    rows, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    of_kernel = jax.lax.platform_dependent(rows, gradients, cpu=_transposed_in_memory, default=_transposed)
    return jnp.dot(gradient, kernel.T), of_kernel


matmul.defvjp(_forward, _backward)


def _transposed(x, y):
    return jnp.dot(x.T, y)


def _transposed_in_memory(x, y):
    """x^T y of x [rows, m] and y [rows, n]: transposes x, or y and the result, whichever are the fewer numbers."""
    (rows, m), n = x.shape, y.shape[1]
    if rows * m > rows * n + m * n:
        return jax.lax.optimization_barrier(_transposed_first(y, x)).T
    return _transposed_first(x, y)


def _transposed_first(x, y):
    return jnp.dot(jax.lax.optimization_barrier(x.T), y)  # without barriers XLA takes transposes into the product
