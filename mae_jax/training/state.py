"""The training state and its creation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from mae_jax.models.parameters import join
from mae_jax.objectives.objective import Variables
from mae_jax.runtime.mesh import create, parameter_shardings, put


class TrainState(NamedTuple):
    """The content of a checkpoint. There is no random state: keys derive from the seed and the step."""

    step: jax.Array  # int32 scalar: steps done
    params: dict[str, Any]  # trained parameters: nested dict of float32 arrays
    opt_state: optax.OptState
    frozen: dict[str, Any] = {}  # frozen parameters
    statistics: dict[str, Any] = {}  # running statistics of BatchNorm
    average: dict[str, Any] = {}  # moving average of `params`, if one is kept
    skipped: jax.Array | int = 0  # int32 scalar: updates skipped because they were not finite

    def variables(self) -> dict[str, Any]:
        """All of the model's variables in one nested dict, with the moving average of `params` if there is one."""
        return join(self.frozen, self.average or self.params, self.statistics)


StateInit = Callable[[jax.Array], TrainState]  # key -> the state at step 0


def make_init(
    init_variables: Callable[[jax.Array], Variables],
    optimizer: optax.GradientTransformation,
    *,
    keep_average: bool = False,
) -> StateInit:
    def init(key: jax.Array) -> TrainState:
        params, frozen, statistics = init_variables(key)
        average = jax.tree.map(jnp.copy, params) if keep_average else {}
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, optimizer.init(params), frozen, statistics, average, jnp.copy(zero))

    return init


def abstract_state(init: StateInit, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and layouts of the state that `init` creates."""
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = parameter_shardings(mesh, shapes)
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)


def create_state(init: StateInit, key: jax.Array, mesh: Mesh) -> TrainState:
    """The state at step 0, each array created on its devices."""
    return create(init, key, mesh)


def start_from(state: TrainState, values: Variables) -> TrainState:
    """Replaces the parameters and statistics of a state that `values` contains."""

    def replace(tree: dict, new: dict) -> dict:
        flat = flatten_dict(tree)
        for path, value in flatten_dict(new).items():
            flat[path] = put(value, flat[path].sharding)
        return unflatten_dict(flat)

    return state._replace(
        params=replace(state.params, values.params),
        frozen=replace(state.frozen, values.frozen),
        statistics=replace(state.statistics, values.statistics),
        average=replace(state.average, values.params) if state.average else {},
    )


def shardings_of(tree) -> NamedSharding:
    """The sharding of each array (or abstract array) in a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
