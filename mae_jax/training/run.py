"""A training run of any objective, from its settings or its newest checkpoint to its result."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
from mae_jax.runtime.signals import StopSignal
from mae_jax.runtime.timing import Profiler, Startup
from mae_jax.training.loop import check_evaluation, train
from mae_jax.training.plan import compile_plan, describe_plan, make_plan, make_train_key
from mae_jax.training.step import start_from
from mae_jax.workdir.checkpoints import Checkpoints
from mae_jax.workdir.folder import keep_earlier_result, keep_earlier_run
from mae_jax.workdir.metrics import Writers
from mae_jax.workdir.reporting import Reporter, provenance
from mae_jax.workdir.writing import finite_or_null, read_object, write_json


def run_training(
    config: ConfigDict, workdir: Path, stop: StopSignal, objective: Objective, mesh: Mesh, startup: Startup
) -> None:
    """Trains by `config`; resumes from the newest checkpoint in `workdir`, and does nothing if the run is finished.

    Raises UserError for unsuitable settings or checkpoints, before anything is compiled; see also `train`.
    """
    plan = make_plan(config, objective, mesh)
    total_steps = plan.total_steps

    # Find out where the run stands.
    described = config.to_dict() | {"num_train_examples": objective.num_train} | objective.facts
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

            # Train.
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
