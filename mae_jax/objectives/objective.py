"""The interface of objectives, and their registry."""

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.augment import dtype_of
from mae_jax.data.depth import settle_depth
from mae_jax.data.device_batches import DeviceBatches, training_batches
from mae_jax.data.resolutions import Stage, check_resolutions
from mae_jax.data.sources import Source, make_sources
from mae_jax.data.statistics import take_statistics
from mae_jax.evaluation.evaluator import EvaluationData, EvaluationSuite, State
from mae_jax.evaluation.unseen import keep_hold_out
from mae_jax.evaluation.unseen_rows import check_unchanged
from mae_jax.interop.transfer import find_start, read_start
from mae_jax.interop.workdirs import Weights
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import batch_parts, check_heads, fit_to_chip
from mae_jax.settings.checks import check_channels, check_colours
from mae_jax.settings.registry import Registry
from mae_jax.workdir.reporting import Reporter

OBJECTIVES: Registry[type["Objective"]] = Registry("task")
OBJECTIVES["pretrain"] = "mae_jax.objectives.pretrain:Pretraining"
OBJECTIVES["classify"] = "mae_jax.objectives.classify:Classification"


class Variables(NamedTuple):
    """A model's variables: nested dicts of float32 arrays."""

    params: dict[str, Any]  # trained parameters
    frozen: dict[str, Any] = {}  # frozen parameters
    statistics: dict[str, Any] = {}  # running statistics of BatchNorm


class LossDetails(NamedTuple):
    """Additional results of a loss function."""

    scalars: dict[str, jax.Array] = {}  # more means over the batch, for the log
    statistics: dict[str, Any] = {}  # of the whole batch (runtime.sharding.mean_over_batch), for the running ones


# (params, frozen params, batch, keys [B]) -> (mean loss over the batch, details)
LossFn = Callable[[dict, dict, dict, jax.Array], tuple[jax.Array, LossDetails]]


class Objective(abc.ABC):
    """A model to train, its data, its loss, and its evaluation; `config.task` names it, or is "module:Class"."""

    decay_tokens = True  # whether class tokens, mask tokens and registers have weight decay
    mixes_pairs = False  # whether rows 2i and 2i + 1 of a batch are mixed, so must stay together
    has_decoder = True  # whether the model has the decoder of `config.model`
    evaluators: tuple[str, ...]  # default of `evaluate.evaluators`
    facts: dict[str, Any] = {}  # saved with the config in each checkpoint
    model: MAEConfig  # from `config.model`; for a classifier, its encoder
    batch: dict[str, jax.ShapeDtypeStruct]  # inputs of the training step

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        """Raises UserError for contradictory settings; needs no data and no devices."""
        check_resolutions(config.train.resolutions)
        parts, size = config.train.accumulate_steps, config.data.batch_size
        if size is not None and parts > size:
            raise UserError(f"train.accumulate_steps={parts} must be at most data.batch_size={size}")

    def __init__(self, config: ConfigDict, workdir: Path, mesh: Mesh):
        """Opens the data, and sets in `config` what they or a checkpoint decide. The mesh may be of other machines."""
        self.config, self.workdir, self.mesh = config, workdir, mesh
        trained, self.weights = find_start(config, workdir)
        self.changed = self.take_over(trained) if trained else []
        for note in take_statistics(config, trained):
            say(f"note: {note}")
        fit_to_chip(config.model, mesh.devices.flat[0], trained and trained["model"])
        keep_hold_out(config, workdir, trained, resumed=self.weights is None)
        self.model = check_model(config)
        check_heads(mesh, self.model, decoder=self.has_decoder)
        self.train_source, self.eval_source = self.open_sources()
        if trained and self.weights is None:  # the run is resumed
            check_unchanged(workdir, trained, self.train_source)
        settle_depth(config.data, (self.train_source, self.eval_source), self.model.channels)
        check_channels(config.data, self.model.channels)  # now that data.dtype is known
        check_colours(config.data, self.model.channels)
        self.num_train = len(self.train_source)
        settle_batch_size(config, self.num_train, mesh, self.mixes_pairs)
        data = EvaluationData(config, self.make_bind(), mesh, self.train_source, self.eval_source)
        self.evaluation = EvaluationSuite(config, data, config.evaluate.evaluators or self.evaluators)
        shape = (config.data.batch_size, *self.model.image_size, self.model.channels)
        self.batch = {"image": jax.ShapeDtypeStruct(shape, dtype_of(config.data))}

    @abc.abstractmethod
    def take_over(self, trained: dict[str, Any]) -> list[str]:
        """Adopts settings of the checkpoint that the run starts from or resumes; returns a line for each override."""

    def open_sources(self) -> tuple[Source, Source]:
        """The training and the evaluation examples."""
        return make_sources(self.config.data, self.model.image_size, self.model.channels)

    @abc.abstractmethod
    def make_bind(self) -> Callable[[dict], Any]:
        """A pure function: variables -> the model that evaluators measure."""

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Variables:
        """Random initial variables; jit-compatible."""

    def start(self) -> Variables | None:
        """Variables that replace random ones at the start; read again if all checkpoints turn out to be damaged."""
        weights, self.weights = self.weights or read_start(self.config, self.workdir), None  # frees the memory
        return self.start_from(weights)

    @abc.abstractmethod
    def start_from(self, weights: Weights | None) -> Variables | None:
        """The variables for `start` from the weights in `init_from`, if any."""

    @abc.abstractmethod
    def describe(self, variables: Variables) -> dict[str, str]:
        """Rows of the summary: name -> text. The arrays may be abstract."""

    @abc.abstractmethod
    def loss_fn(self, params: dict, frozen: dict, batch: dict, keys: jax.Array) -> tuple[jax.Array, LossDetails]:
        """The loss of a device's rows of a batch (see LossFn); each row's key drives its randomness."""

    @abc.abstractmethod
    def train_flops(self, image_size: tuple[int, int]) -> int:
        """FLOPs of one training example of this size, forward and backward."""

    def batches(self, state: State, steps: range, stages: tuple[Stage, ...]) -> DeviceBatches:
        """The batches of these steps; images have the size of their stage."""
        source, data, channels = self.train_source, self.config.data, self.model.channels
        return training_batches(source, data, channels, self.mesh, self.batch, stages, steps)

    def evaluate(self, state: State, reporter: Reporter) -> dict[str, float]:
        """Runs all evaluators: returns numbers by name (only "loss" if not finite); pictures go to the reporter."""
        scores, pictures = self.evaluation.run(state)
        for name, picture in pictures.items():
            reporter.picture(int(state.step), name, picture)
        return scores

    @abc.abstractmethod
    def result(self, state: State, scores: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
        """The content of result.json besides the step, and closing lines of text."""


def check_model(config: ConfigDict, *, opened: bool = True) -> MAEConfig:
    """The model of the settings; UserError if it is invalid or other settings do not fit it.

    Before the data are opened, `take_statistics` may still have to set their mean and std.
    """
    model = MAEConfig(**config.model)
    if opened or not (config.data.statistics or config.data.name == "prepared"):
        check_channels(config.data, model.channels)
    check_colours(config.data, model.channels)
    check_resolutions(config.train.resolutions, model)
    return model


def settle_batch_size(config: ConfigDict, num_train: int, mesh: Mesh, mixes_pairs: bool = False) -> None:
    """Sets an open `data.batch_size`; UserError unless the data fill a batch that splits evenly over the devices."""
    unit = batch_parts(mesh) * config.train.accumulate_steps * (2 if mixes_pairs else 1)
    if config.data.batch_size is None:
        fitting = min(max(num_train // 16, 16), 256, num_train)
        power_of_two = 1 << fitting.bit_length() >> 1
        config.data.batch_size = max(power_of_two // unit, 1) * unit
    size = config.data.batch_size
    if size > num_train:
        raise UserError(f"data.batch_size={size} is larger than the training data: set it to {num_train} or less")
    if size % unit:
        pairs = " x pairs to mix" if mixes_pairs else ""
        raise UserError(
            f"data.batch_size={size} must be a multiple of {unit} ({batch_parts(mesh)} devices x "
            f"train.accumulate_steps={config.train.accumulate_steps}{pairs})"
        )
