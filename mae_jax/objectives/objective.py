"""What the training loop asks of a task: what to train, on what, and how it is measured."""

from typing import Any, Protocol

import jax

from mae_jax.data.device import DeviceBatches
from mae_jax.data.resolutions import Stage
from mae_jax.training.state import TrainState, Variables
from mae_jax.training.step import LossDetails
from mae_jax.workdir.reporting import Reporter


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

    def batches(self, state: TrainState, steps: range, stages: tuple[Stage, ...]) -> DeviceBatches:
        """The batches of some steps; images have the size of their step's stage."""

    def evaluate(self, state: TrainState, reporter: Reporter) -> dict[str, float]:
        """Scores, "loss" among them; only it if it is not finite."""

    def result(self, state: TrainState, scores: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
        """What result.json holds besides the step, and the lines that a person reads."""
