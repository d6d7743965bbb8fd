"""Random keys: all randomness on the devices comes from the run's one seed."""

import jax

PURPOSES = ("init", "train", "evaluate")


def make_key(seed: int, purpose: str) -> jax.Array:
    """The key for initial parameters, training steps or masks of the evaluation."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
