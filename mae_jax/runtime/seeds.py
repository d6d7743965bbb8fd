"""Random keys: everything random on the device derives from the run's one seed."""

import jax

PURPOSES = ("init", "train", "evaluate")


def make_key(seed: int, purpose: str) -> jax.Array:
    """The key of one purpose: of the initial parameters, of the training steps, or of the evaluation's masks."""
    return jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose))
