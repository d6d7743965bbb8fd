"""Random keys: all randomness on devices derives from the run's single seed."""

import jax

PURPOSES = ("init", "train", "evaluate")


def make_key(seed: int, purpose: str) -> jax.Array:
    """The key for initial parameters, training steps, or evaluation masks."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
