"""A run, from its settings or its newest checkpoint to its result. What is trained is the task's affair."""

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_collections
from jax.sharding import Mesh

from mae_jax.data.device import to_devices
from mae_jax.errors import NotSaved, UserError, reason
from mae_jax.mesh import batch_parts
from mae_jax.processes import from_main, sum_of_all
from mae_jax.seeding import make_key
from mae_jax.training.checkpoints import Checkpoints
from mae_jax.training.loop import NonFiniteLoss, train
from mae_jax.training.optimizers import fit_warmup, make_optimizer, make_schedule
from mae_jax.training.reporting import (
    Reporter,
    check_not_beyond,
    keep_earlier_result,
    provenance,
    write_if_possible,
    write_json,
)
from mae_jax.training.signals import StopSignal
from mae_jax.training.state import TrainState, Variables, abstract_state, create_state, make_init, start_from
from mae_jax.training.step import LossDetails, compile_train_step, make_train_step, memory_in_bytes
from mae_jax.training.summary import summarize


class HostBatches(Iterator[dict], Protocol):
    """Endless batches of NumPy arrays with a leading axis [b]."""

    bad_images: dict[int, str]  # index -> name of the pictures that were replaced

    def close(self) -> None: ...


class Trainee(Protocol):
    """What a task trains, and how it is measured."""

    num_train: int  # examples
    num_eval: int
    train_flops: int  # of one example, forward and backward
    decay_tokens: bool  # whether class and mask tokens have weight decay
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

    def batches(self, state: TrainState, start_step: int) -> HostBatches:
        """The batches from a step on."""

    def evaluate(self, state: TrainState, reporter: Reporter) -> dict[str, float]:
        """Scores, "loss" among them; only it if it is not finite."""

    def result(self, state: TrainState, scores: dict[str, float]) -> tuple[dict[str, Any], list[str]]:
        """What result.json holds besides the step, and the lines that a person reads."""


def run_training(
    config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal, trainee: Trainee, mesh: Mesh
) -> None:
    """Trains as `config` says; goes on from the newest checkpoint in `workdir`, does nothing if it is finished.

    Raises:
      UserError: for settings or checkpoints that do not fit, before anything is compiled.
      NonFiniteLoss: where the loss stops being a number.
      Stopped: after a signal, when everything is saved.
      NotSaved: if what was reached at the end, or when a signal came, cannot be written.
    """
    # What will run.
    check_batch_size(config, batch_parts(mesh), trainee)
    batch_size = config.data.batch_size
    steps_per_epoch = max(1, trainee.num_train // batch_size)
    total_steps = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    warmup_steps = fit_warmup(round(config.optimizer.warmup_epochs * steps_per_epoch), total_steps)
    schedule = make_schedule(config.optimizer, batch_size, warmup_steps, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule, decay_tokens=trainee.decay_tokens)
    init = make_init(trainee.init, optimizer, keep_average=config.train.ema_decay is not None)
    abstract = abstract_state(init, mesh)

    # Where it stands.
    described = config.to_dict() | {"num_train_examples": trainee.num_train} | trainee.facts
    checkpoints = Checkpoints(workdir, config.checkpoint, described)
    saved_step = checkpoints.newest_whole(abstract)
    start_step = saved_step or 0
    changed = {} if saved_step is None else checkpoints.changed_settings(saved_step)
    check_not_beyond(workdir, start_step, total_steps)
    if start_step == total_steps and from_main((workdir / "result.json").exists()):
        print(f"{workdir} is finished: all {total_steps} steps are done, result.json has the numbers")
        return
    starting_values = trainee.start() if saved_step is None else None
    keep_earlier_result(workdir, start_step)
    settings = config.to_dict() | provenance()
    settings = None if write_if_possible(workdir / "config.json", settings) else settings
    print(f"{config.data.name} -> {workdir}")
    variables = Variables(abstract.params, abstract.frozen, abstract.statistics)
    print(summarize(config, trainee, variables, mesh, warmup_steps=warmup_steps, total_steps=total_steps))
    for key, (then, now) in changed.items():
        print(f"  changed   {key} was {then!r} up to step {start_step}, is now {now!r}")

    # Run it.
    if saved_step is not None:
        state = checkpoints.restore(saved_step, abstract)
        print(f"going on from checkpoint {saved_step}", flush=True)
    else:
        state = create_state(init, make_key(config.seed, "init"), mesh)
        state = start_from(state, starting_values) if starting_values else state
        del starting_values
    key = make_key(config.seed, "train")
    step_fn = make_train_step(
        trainee.loss_fn,
        optimizer,
        schedule,
        mesh,
        config.train.accumulate_steps,
        config.train.ema_decay,
        trainee.mixes_pairs,
    )
    if start_step < total_steps:
        step_fn = compile_and_tell(step_fn, abstract, trainee.batch, key, mesh)
    reporter = Reporter(
        workdir, start_step=start_step, total_steps=total_steps, batch_size=batch_size,
        flops_per_image=trainee.train_flops, unwritten_config=settings,
    )  # fmt: skip

    def evaluate(state: TrainState) -> dict[str, float]:
        scores = trainee.evaluate(state, reporter)
        if not math.isfinite(scores["loss"]):
            checkpoints.set_aside(int(state.step))
            raise NonFiniteLoss(int(state.step), "eval/loss", scores["loss"], checkpoints.latest_step())
        return scores

    with contextlib.closing(checkpoints), contextlib.closing(reporter):
        batches = trainee.batches(state, start_step)
        wanted = ({name: batch[name] for name in trainee.batch} for batch in batches)
        with contextlib.closing(batches):
            state = train(
                state, step_fn, to_devices(wanted, mesh, config.data.prefetch_batches), key,
                total_steps=total_steps, log_every_steps=config.train.log_every_steps,
                evaluate=evaluate, evaluate_every_steps=config.evaluate.every_steps,
                checkpoints=checkpoints, reporter=reporter, stop=stop,
            )  # fmt: skip
        if line := checkpoints.summary():
            reporter.line(line)
        scores = evaluate(state)
        if not reporter.has_evaluation(total_steps):  # it has if the run was killed after this line
            reporter.scalars(total_steps, scores, prefix="eval/")
        result, lines = trainee.result(state, scores)
        try:
            write_json(workdir / "result.json", {"step": total_steps} | result)
        except OSError as error:
            raise NotSaved(
                f"{workdir}/result.json cannot be written: {reason(error)}; free space there, the same command "
                f"goes on from checkpoint {total_steps}"
            ) from error
        if replaced := sum_of_all(len(batches.bad_images)):  # since the run was last started
            lines.append(f"{replaced} images could not be read and were replaced; the log names them")
        reporter.line("\n".join(lines))


def check_batch_size(config: ml_collections.ConfigDict, parts: int, trainee: Trainee) -> None:
    """Raises UserError unless the data fill a batch, and its parts can be split evenly over the devices."""
    size = config.data.batch_size
    unit = parts * config.train.accumulate_steps * (2 if trainee.mixes_pairs else 1)
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


def compile_and_tell(step_fn, state: TrainState, batch: dict, key: jax.Array, mesh: Mesh):
    """Compiles the step and prints how long that took and what memory the step needs."""
    start = time.perf_counter()
    compiled = compile_train_step(step_fn, state, batch, key, mesh)
    memory = memory_in_bytes(compiled)
    text = "" if memory is None else f", needs {memory / 2**20:,.0f} MiB a device"
    print(f"  step      compiled in {time.perf_counter() - start:.1f} s{text}", flush=True)
    return compiled
