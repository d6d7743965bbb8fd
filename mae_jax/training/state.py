"""What a training step changes, and how it comes to be."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from mae_jax.mesh import parameter_shardings


class TrainState(NamedTuple):
    """Everything that a checkpoint holds. There is no random state: keys derive from the seed and the step."""

    step: jax.Array  # int32 scalar: updates done
    params: dict[str, Any]  # nested dict of float32 arrays
    opt_state: optax.OptState


def make_init(init_params: Callable[[jax.Array], dict], optimizer: optax.GradientTransformation):
    """A function key -> TrainState at step 0."""

    def init(key: jax.Array) -> TrainState:
        params = init_params(key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return init


def abstract_state(init: Callable[[jax.Array], TrainState], mesh: Mesh) -> TrainState:
    """Shapes, types and layouts of the state that `init` makes, without making it."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = parameter_shardings(mesh, shapes)
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)


def create_state(init: Callable[[jax.Array], TrainState], key: jax.Array, mesh: Mesh) -> TrainState:
    """The state at step 0, every array created where it will live."""
    return jax.jit(init, out_shardings=shardings_of(abstract_state(init, mesh)))(key)


def shardings_of(tree) -> NamedSharding:
    """The layout of each array (or abstract array) of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
