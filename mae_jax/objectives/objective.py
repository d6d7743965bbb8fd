"""What the training loop asks of a task: what to train, on what, and how it is measured."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import ml_collections
from jax.sharding import Mesh

from mae_jax.data.device import DeviceBatches
from mae_jax.data.resolutions import Stage
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import batch_parts
from mae_jax.workdir.reporting import Reporter


class Variables(NamedTuple):
    """A model's values: nested dicts of float32 arrays."""

    params: dict[str, Any]  # those that train
    frozen: dict[str, Any] = {}  # parameters that stay as they are
    statistics: dict[str, Any] = {}  # running statistics of BatchNorm


class State(Protocol):
    """What training hands to an objective (training.state.TrainState)."""

    step: jax.Array  # int32 scalar: updates done
    average: dict[str, Any]  # moving average of the parameters; empty if none is kept

    def variables(self) -> dict[str, Any]:
        """All that the model needs, in one nested dict; of the moving average if there is one."""


class LossDetails(NamedTuple):
    """What a loss function returns besides the mean loss."""

    scalars: dict[str, jax.Array] = {}  # further means over the batch, to report
    statistics: dict[str, Any] = {}  # the batch's statistics, for the running ones


# (params, frozen params, batch, keys [B]) -> (mean loss over the batch, details)
LossFn = Callable[[dict, dict, dict, jax.Array], tuple[jax.Array, LossDetails]]


class Trainee(Protocol):
    """What a task trains, and how it is measured."""

    num_train: int  # examples
    num_eval: int
    train_flops: int  # of one example of the model's own size, forward and backward
    decay_tokens: bool  # whether class and mask tokens and registers have weight decay
    mixes_pairs: bool  # whether rows 2i and 2i + 1 of a batch are mixed
    batch: dict[str, jax.ShapeDtypeStruct]  # what the step takes
    facts: dict[str, Any]  # saved with the config in each checkpoint

    def init(self, key: jax.Array) -> Variables:
        """Random variables; jax.jit compiles it."""

    def start(self) -> Variables | None:
        """Values to begin with in place of random ones; the rest stays random."""

    def describe(self, variables: Variables) -> dict[str, str]:
        """Rows of the summary: name -> text. The variables may be abstract."""

    def loss_fn(self, params: dict, frozen: dict, batch: dict, keys: jax.Array) -> tuple[jax.Array, LossDetails]:
        """The loss of a device batch (step.LossFn)."""

    def train_flops_at(self, image_size: tuple[int, int]) -> int:
        """`train_flops` of an image of another size."""

    def batches(self, state: State, steps: range, stages: tuple[Stage, ...]) -> DeviceBatches:
        """The batches of some steps; images have the size of their step's stage."""

    def evaluate(self, state: State, reporter: Reporter) -> dict[str, float]:
        """Scores, "loss" among them; only it if it is not finite."""

    def result(self, state: State, scores: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
        """What result.json holds besides the step, and the lines that a person reads."""


def settle_batch_size(config: ml_collections.ConfigDict, num_train: int, mesh: Mesh, mixes_pairs: bool = False) -> None:
    """Sets `data.batch_size` by the number of training pictures if it is open: enough steps, none of them too noisy."""
    if config.data.batch_size is None:
        fitting = min(max(_power_of_two(num_train // 16), 16), 256, _power_of_two(num_train))
        unit = _unit(config, batch_parts(mesh), mixes_pairs)
        config.data.batch_size = max(fitting // unit, 1) * unit


def _power_of_two(number: int) -> int:
    """The largest one up to a number; 0 if that is 0."""
    return 2 ** (number.bit_length() - 1) if number else 0


def _unit(config: ml_collections.ConfigDict, parts: int, mixes_pairs: bool) -> int:
    """What a batch must be a multiple of."""
    return parts * config.train.accumulate_steps * (2 if mixes_pairs else 1)


def check_batch_size(config: ml_collections.ConfigDict, parts: int, trainee: Trainee) -> None:
    """Raises UserError unless the data fill a batch, and its parts can be split evenly over the devices."""
    size = config.data.batch_size
    unit = _unit(config, parts, trainee.mixes_pairs)
    if size % unit:
        pairs = " x pairs to mix" if trainee.mixes_pairs else ""
        raise UserError(
            f"data.batch_size={size} cannot be split evenly over {parts} devices x "
            f"train.accumulate_steps={config.train.accumulate_steps}{pairs}; make it a multiple of {unit}"
        )
    if size > trainee.num_train:
        raise UserError(
            f"data.batch_size={size} is larger than the training data ({trainee.num_train} pictures): "
            f"set data.batch_size to {trainee.num_train} or less"
        )
