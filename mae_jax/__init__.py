"""Masked autoencoders in JAX and Flax."""

from mae_jax.interop.weights import load

__all__ = ["load"]
