"""A training run of any objective, and the one training loop.

Its order: evaluate the state, save it, take the next batch, make the step. So the state saved after s steps has seen
exactly the batches 0 ... s - 1, and a run resumed from it continues with batch s.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mae_jax.data.resolutions import size_at
from mae_jax.objectives.objective import Objective
from mae_jax.runtime.console import say
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.memory import bytes_on_a_device, check_memory
from mae_jax.runtime.mesh import create
from mae_jax.runtime.processes import from_main, sum_of_all
from mae_jax.runtime.seeds import make_key
from mae_jax.runtime.signals import Stopped, StopSignal
from mae_jax.runtime.timing import Profiler, Startup
from mae_jax.training.plan import compile_plan, describe_plan, make_plan, make_train_key
from mae_jax.training.step import TrainState, TrainStep, start_from
from mae_jax.workdir.checkpoints import Checkpoints
from mae_jax.workdir.folder import keep_earlier_result, keep_earlier_run
from mae_jax.workdir.metrics import Writers
from mae_jax.workdir.reporting import Reporter, provenance
from mae_jax.workdir.writing import finite_or_null, read_object, write_json

MAX_STEPS_AHEAD = 2
CHECKED = ("loss", "grad_norm")


class NonFiniteLoss(ArithmeticError):
    """Loss, gradient or state are not finite. `step` counts from 1, as in all reports."""

    def __init__(self, step: int, what: str, last_checkpoint: int | None):  # what: such as "train/loss is nan"
        kept = f"checkpoint {last_checkpoint} is the last good one" if last_checkpoint else "no good checkpoint exists"
        super().__init__(
            f"{what} at step {step}; {kept}. Try a lower --config.optimizer.base_learning_rate, "
            "--config.optimizer.clip_norm=1, a longer warm-up, or --config.model.dtype=float32; "
            "the same command with the change goes on from the last checkpoint"
        )
        self.step = step


def check_evaluation(scores: dict[str, float], step: int, unproven: int, checkpoints: Checkpoints) -> None:
    """If the evaluation loss is not finite, sets the checkpoint of step `unproven` aside and raises NonFiniteLoss."""
    if not np.isfinite(scores.get("loss", 0.0)):  # `evaluate.evaluators` may lack "loss"
        checkpoints.set_aside(unproven)
        raise NonFiniteLoss(step, f"eval/loss is {scores['loss']}", checkpoints.latest_step())


def train(
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterator[dict],
    key: jax.Array,
    *,
    total_steps: int,
    log_every_steps: int,
    evaluate: Callable[[TrainState], dict[str, Any]],
    evaluate_every_steps: int | None,
    checkpoints: Checkpoints,
    reporter: Reporter,
    profiler: Profiler,
    stop: StopSignal,
    startup: Startup,
) -> TrainState:
    """Trains from `state` to `total_steps` with the batches from its step on; saves and returns the last state.

    Raises NonFiniteLoss at a report of a step that is not finite and not skipped (no later state is saved, a checkpoint
    without a finite loss so far is set aside); Stopped after a signal, once the state is on disk; NotSaved.
    """
    step = start_step = int(state.step)
    pending = []  # (step, scalars on the device) not yet checked
    unproven = step  # the newest state that came from a finite loss, and may not give one; later ones are not saved
    waited, clock, clock_step = 0.0, time.perf_counter(), step
    skipped = int(state.skipped)

    def look() -> dict[str, float]:
        """Fetches the pending scalars, checks that they are finite, and returns the last ones."""
        nonlocal skipped, unproven
        scalars = {}
        fetched = jax.device_get(pending)
        pending.clear()
        for at_step, scalars in fetched:
            wrong = [f"train/{name} is {scalars[name]}" for name in CHECKED if not np.isfinite(scalars[name])]
            wrong += [] if scalars["finite"] else ["the state after the update is not finite"]
            if wrong:
                if scalars.get("skipped", 0) <= skipped:  # the update was not skipped
                    if not np.isfinite(scalars["loss"]):  # the loss of the state before the step, which may be saved
                        checkpoints.set_aside(unproven)
                    raise NonFiniteLoss(at_step, wrong[0], checkpoints.latest_step())
                skipped = int(scalars["skipped"])
                told = f"({skipped} so far, train.skip_nonfinite)"
                reporter.line(f"step {at_step}: {wrong[0]}; the update was left out {told}")
            if np.isfinite(scalars["loss"]):
                unproven = at_step
        return {name: float(value) for name, value in scalars.items() if name != "finite"}

    with stop.deferred():
        while True:
            evaluation_due = evaluate_every_steps and 0 < step < total_steps and step % evaluate_every_steps == 0
            save_due = step == total_steps or checkpoints.due(step)
            stop.agree(step)
            if evaluation_due or save_due or stop.received:
                look()
                paused = time.perf_counter()
                doubtful = unproven < step == total_steps  # is the last batch to blame, or the state?
                if doubtful or (evaluation_due and not reporter.has_evaluation(step)):
                    # An evaluation that a signal interrupts is repeated when the run resumes.
                    with contextlib.suppress(Stopped):
                        stop.look()
                        scores = evaluate(state)
                        check_evaluation(scores, step, unproven, checkpoints)
                        if doubtful:
                            unproven = step
                        else:
                            reporter.scalars(step, scores, prefix="eval/")
                stopping = stop.received  # read only once, so that the state is saved before stopping
                if (save_due or stopping) and unproven == step:
                    if seconds := checkpoints.save(step, state):
                        reporter.saved(step, seconds)
                if stopping:
                    checkpoints.wait()
                    kept = "everything is saved" if unproven == step else "its loss is not finite and it is not saved"
                    reporter.line(f"stopped by a signal at step {step}; {kept}; the same command resumes the run")
                    raise Stopped
                clock += time.perf_counter() - paused
            if step == total_steps:
                break

            # Two steps ahead keep the device busy; more would fill its memory with batches and hide waiting for data.
            if len(pending) >= MAX_STEPS_AHEAD:
                jax.block_until_ready(pending[-MAX_STEPS_AHEAD])
            profiler.before_step(step, state)
            with jax.transfer_guard("disallow"):  # an implicit transfer would slow each step down
                before = time.perf_counter()
                try:
                    with stop.waiting():
                        batch = next(batches)
                except Stopped:
                    continue  # the state has not changed
                waited += time.perf_counter() - before
                state, scalars = step_fn(state, batch, key)
            step += 1
            pending.append((step, scalars))
            if step == start_step + 1:
                jax.block_until_ready(scalars)
                startup.add("data", waited)
                reporter.line(startup.describe())

            if step % log_every_steps == 0 or step in (1, total_steps):
                scalars = look()
                now = time.perf_counter()
                reporter.training(step, scalars, seconds=now - clock, steps=step - clock_step, waited=waited)
                waited, clock, clock_step = 0.0, now, step
                checkpoints.check()
        checkpoints.wait()
    stop.look()  # a signal may have come while the last checkpoint was written
    return state


def run_training(
    config: ConfigDict, workdir: Path, stop: StopSignal, objective: Objective, mesh: Mesh, startup: Startup
) -> None:
    """Trains by `config`, from the newest checkpoint if any. UserError before compiling; see also `train`."""
    plan = make_plan(config, objective, mesh)
    total_steps = plan.total_steps

    # Find out where the run stands.
    pictures = {"num_train_examples": objective.num_train, "train_pictures": objective.train_source.digest()}
    described = config.to_dict() | pictures | objective.facts
    checkpoints = Checkpoints(workdir, config.checkpoint, described)
    saved_step = checkpoints.newest_whole()
    start_step = saved_step or 0
    changed = {} if saved_step is None else checkpoints.changed_settings(saved_step)
    if start_step > total_steps:
        raise UserError(
            f"{workdir} is at step {start_step} already, beyond the {total_steps} steps of this command; "
            f"raise train.steps or train.epochs, or choose another --workdir"
        )
    if start_step == total_steps and from_main(read_object(workdir / "result.json") is not None):
        say(f"{workdir} is finished: all {total_steps} steps are done, result.json has the numbers")
        return
    if saved_step is None:
        starting_values = objective.start()
        keep_earlier_run(workdir)
    else:
        keep_earlier_result(workdir, saved_step)

    # Describe the run.
    write_json(workdir / "config.json", config.to_dict() | provenance())
    say(f"{config.data.name} -> {workdir}", *describe_plan(config, objective, mesh, plan))
    for key, (then, now) in changed.items():
        say(f"  changed   {key} was {then!r} up to step {start_step}, is now {now!r}")

    # Create the state and the first batches while the step compiles, which leaves a core free.
    check_memory(bytes_on_a_device(plan.abstract), mesh)
    key = make_train_key(config.seed, mesh)
    compiler = ThreadPoolExecutor(1)
    compiling = compiler.submit(compile_plan, plan, objective, start_step, key, mesh)
    compiler.shutdown(wait=False)
    if saved_step is not None:
        state = checkpoints.restore(saved_step, plan.abstract)
        say(f"going on from checkpoint {saved_step}")
    else:
        with startup.phase("compile"):
            state = create(plan.init, make_key(config.seed, "init"), mesh)
        state = start_from(state, starting_values) if starting_values else state
        del starting_values
    flops = {stage.image_size: objective.train_flops(stage.image_size) for stage in plan.stages}
    reporter = Reporter(
        workdir, Writers(workdir, config.to_dict(), start_step), start_step=start_step, total_steps=total_steps,
        batch_size=config.data.batch_size,
        flops_per_image=lambda step: flops[size_at(plan.stages, step)],
    )  # fmt: skip
    profiler = Profiler(workdir / "profile", config.train.profile_steps, start_step)
    with contextlib.closing(checkpoints), contextlib.closing(reporter), contextlib.closing(profiler):
        with startup.phase("data"):
            batches = objective.batches(state, range(start_step, total_steps), plan.stages)
        with contextlib.closing(batches):
            with startup.phase("compile"):
                step_fn, lines = compiling.result()
            reporter.line(*lines)
            state = train(
                state, step_fn, batches, key,
                total_steps=total_steps, log_every_steps=config.train.log_every_steps,
                evaluate=lambda state: objective.evaluate(state, reporter),
                evaluate_every_steps=config.evaluate.every_steps,
                checkpoints=checkpoints, reporter=reporter, profiler=profiler, stop=stop, startup=startup,
            )  # fmt: skip
        if line := checkpoints.summary():
            reporter.line(line)

        # Measure the result.
        scores = objective.evaluate(state, reporter)
        check_evaluation(scores, total_steps, total_steps, checkpoints)
        if reporter.has_evaluation(total_steps):  # the run was killed after the report
            reporter.draw_curves()
        else:
            reporter.scalars(total_steps, scores, prefix="eval/")
        result, lines = objective.result(state, scores)
        write_json(workdir / "result.json", finite_or_null({"step": total_steps} | result))
        if replaced := sum_of_all(len(batches.bad_images)):  # since the last start
            lines.append(f"{replaced} images could not be read and were replaced; the log names them")
        reporter.line(*lines)
