"""Pre-training: train a masked autoencoder, draw what it reconstructs, measure what its encoder has learnt."""

import contextlib
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections

from mae_jax.data.augment import normalize, random_flip
from mae_jax.data.loader import make_train_batches, prefetch_to_device
from mae_jax.data.sources import make_source
from mae_jax.errors import UserError
from mae_jax.evaluation.pretraining import MAEEvaluation
from mae_jax.interop.weights import read_fitting_params
from mae_jax.mesh import batch_parts, batch_sharding, make_mesh, put_batch
from mae_jax.models.flops import train_flops
from mae_jax.models.mae import MAEConfig, init_params, make_bind
from mae_jax.seeding import make_key
from mae_jax.training.checkpoints import Checkpoints
from mae_jax.training.loop import NonFiniteLoss, train
from mae_jax.training.optimizers import fit_warmup, make_optimizer, make_schedule
from mae_jax.training.reporting import Reporter, check_not_beyond, keep_earlier_result, provenance, write_json
from mae_jax.training.signals import StopSignal
from mae_jax.training.state import TrainState, abstract_state, create_state, make_init, shardings_of
from mae_jax.training.step import LossFn, compile_train_step, make_train_step, memory_in_bytes
from mae_jax.training.summary import summarize


def run(config: ml_collections.ConfigDict, workdir: Path, stop: StopSignal) -> None:
    """Pre-trains as `config` says; goes on from the newest checkpoint in `workdir`, does nothing if it is finished.

    Raises:
      UserError: for settings, data or checkpoints that do not fit, before anything is compiled.
    """
    # What will run.
    model = MAEConfig(**config.model)
    mesh = make_mesh(config.mesh)
    check_batch_size(config, batch_parts(mesh))
    train_source = make_source(config.data, "train", model.image_size, model.channels)
    eval_source = make_source(config.data, "eval", model.image_size, model.channels)
    evaluation = MAEEvaluation(config, model, mesh, train_source, eval_source)
    steps_per_epoch = max(1, len(train_source) // config.data.batch_size)
    total_steps = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    warmup_steps = fit_warmup(round(config.optimizer.warmup_epochs * steps_per_epoch), total_steps)
    schedule = make_schedule(config.optimizer, config.data.batch_size, warmup_steps, total_steps)
    optimizer = make_optimizer(config.optimizer, schedule)
    init = make_init(functools.partial(init_params, model), optimizer)
    abstract = abstract_state(init, mesh)

    # Where it stands.
    described = config.to_dict() | {"num_train_examples": len(train_source)}
    checkpoints = Checkpoints(workdir, config.checkpoint, described)
    start_step = checkpoints.latest_step() or 0
    changed = checkpoints.changed_settings(start_step) if start_step else {}
    check_not_beyond(workdir, start_step, total_steps)
    if start_step == total_steps and (workdir / "result.json").exists():
        print(f"{workdir} is finished: all {total_steps} steps are done, result.json has the numbers")
        return
    batches = make_train_batches(
        train_source, config.data, model.image_size, model.channels,
        start_step=start_step, process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    keep_earlier_result(workdir, start_step)
    write_json(workdir / "config.json", config.to_dict() | provenance())
    print(f"{config.data.name} -> {workdir}")
    print(
        summarize(
            config,
            model,
            abstract.params,
            mesh,
            num_train=len(train_source),
            num_eval=len(eval_source),
            warmup_steps=warmup_steps,
            total_steps=total_steps,
        )  # fmt: skip
    )
    for key, (then, now) in changed.items():
        print(f"  changed   {key} was {then!r} up to step {start_step}, is now {now!r}")

    # Run it.
    if start_step:
        state = checkpoints.restore(start_step, abstract)
        print(f"going on from checkpoint {start_step}", flush=True)
    else:
        state = first_state(config, init, abstract, mesh)
    key = make_key(config.seed, "train")
    step_fn = make_train_step(make_loss_fn(config, model), optimizer, schedule, config.train.accumulate_steps)
    if start_step < total_steps:
        step_fn = compile_and_tell(step_fn, abstract, config, model, key, mesh)
    reporter = Reporter(
        workdir, start_step=start_step, total_steps=total_steps, batch_size=config.data.batch_size,
        flops_per_image=train_flops(model),
    )  # fmt: skip

    def evaluate(state: TrainState) -> dict[str, float]:
        step, scores = int(state.step), {"loss": evaluation.loss(state.params)}
        if not math.isfinite(scores["loss"]):
            checkpoints.set_aside(step)
            raise NonFiniteLoss(step, "eval/loss", scores["loss"], checkpoints.latest_step())
        reporter.picture(step, "reconstructions", evaluation.picture(state.params, f"step {step:,}"))
        return scores | (evaluation.features(state.params) if evaluation.labelled else {})

    put = functools.partial(put_batch, sharding=batch_sharding(mesh))
    device_batches = prefetch_to_device(({"image": b["image"]} for b in batches), put, config.data.prefetch_batches)
    with contextlib.closing(batches), contextlib.closing(checkpoints), contextlib.closing(reporter):
        state = train(
            state, step_fn, device_batches, key,
            total_steps=total_steps, log_every_steps=config.train.log_every_steps,
            evaluate=evaluate, evaluate_every_steps=config.evaluate.every_steps,
            checkpoints=checkpoints, reporter=reporter, stop=stop,
        )  # fmt: skip
        scores = evaluate(state)
        if not reporter.has_evaluation(total_steps):  # it has if the run was killed after this line
            reporter.scalars(total_steps, scores, prefix="eval/")
        result = {"step": total_steps, "eval/loss": scores.pop("loss")} | scores
        if evaluation.labelled:
            random_params = jax.jit(functools.partial(init_params, model))(make_key(config.seed, "init"))
            random_scores = evaluation.features(random_params)
            result |= {f"random_encoder/{name}": value for name, value in random_scores.items()}
            result["protocol"] = evaluation.protocol
        write_json(workdir / "result.json", result)
        reporter.line(describe_result(result, workdir, len(batches.bad_images)))


def check_batch_size(config: ml_collections.ConfigDict, parts: int) -> None:
    """Raises UserError unless every accumulation part of a batch can be split evenly over the devices."""
    unit = parts * config.train.accumulate_steps
    if config.data.batch_size % unit:
        raise UserError(
            f"data.batch_size={config.data.batch_size} cannot be split evenly over {parts} devices x "
            f"train.accumulate_steps={config.train.accumulate_steps}; make it a multiple of {unit}"
        )


def make_loss_fn(config: ml_collections.ConfigDict, model: MAEConfig) -> LossFn:
    """The masked loss of a batch {"image": uint8 [B, H, W, C]}; each image's key decides its flip and its mask."""
    bind, data = make_bind(model), config.data

    def loss_fn(params: dict, batch: dict, keys: jax.Array) -> tuple[jax.Array, dict]:
        flip_keys, mask_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        images = random_flip(flip_keys, batch["image"]) if data.flip else batch["image"]
        return bind(params)(normalize(images, data.mean, data.std), key=mask_keys).loss, {}

    return loss_fn


def first_state(config, init: Callable[[jax.Array], TrainState], abstract: TrainState, mesh) -> TrainState:
    """The state at step 0: random, or with the parameters of `config.init_from`."""
    params = read_fitting_params(config.init_from, config, abstract.params) if config.init_from else None
    state = create_state(init, make_key(config.seed, "init"), mesh)
    if params is None:
        return state
    return state._replace(params=jax.device_put(params, shardings_of(abstract.params)))


def compile_and_tell(step_fn, state: TrainState, config, model: MAEConfig, key: jax.Array, mesh):
    """Compiles the step and prints how long that took and what memory the step needs."""
    shape = (config.data.batch_size, *model.image_size, model.channels)
    batch = {"image": jax.ShapeDtypeStruct(shape, jnp.uint8)}
    start = time.perf_counter()
    compiled = compile_train_step(step_fn, state, batch, key, mesh)
    memory = memory_in_bytes(compiled)
    text = "" if memory is None else f", needs {memory / 2**20:,.0f} MiB a device"
    print(f"  step      compiled in {time.perf_counter() - start:.1f} s{text}", flush=True)
    return compiled


def describe_result(result: dict, workdir: Path, bad_images: int) -> str:
    """What the run has learnt, as a person reads it. `bad_images`: replaced since the run was last started."""
    lines = [f"done: {result['step']:,} steps, loss on unseen images {result['eval/loss']:.4f}"]
    if "protocol" in result:
        lines.append(f"what was learnt (top-1)      {'this encoder':>14}{'random encoder':>17}")
        for name, title in (("knn/top1", "k-NN"), ("linear_probe/top1", "linear probe")):
            if name in result:
                lines.append(f"  {title:<27}{result[name]:>14.1%}{result['random_encoder/' + name]:>17.1%}")
        lines.append(result["protocol"])
    else:
        lines.append("the images have no labels: k-NN and the linear probe are left out")
    if bad_images:
        lines.append(f"{bad_images} images could not be read and were replaced by others; the log names them")
    lines.append(f"see {workdir}/reconstructions/{result['step']}.png and {workdir}/result.json")
    return "\n".join(lines)
