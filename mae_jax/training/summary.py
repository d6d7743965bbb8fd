"""What will run, told before it runs."""

import jax
import ml_collections
from jax.sharding import Mesh

from mae_jax.data.resolutions import Stage
from mae_jax.objectives.objective import Variables
from mae_jax.runtime.text import si, size_text
from mae_jax.training.optimizers import peak_learning_rate


def summarize(
    config: ml_collections.ConfigDict,
    trainee,
    variables: Variables,
    mesh: Mesh,
    *,
    warmup_steps: int,
    total_steps: int,
    stages: tuple[Stage, ...],
) -> str:
    """The task's own rows, data among them, then batch, stages if there are several, schedule and mesh, a line each.

    `variables` may be abstract.
    """
    devices = mesh.devices.flat
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    data, train = config.data, config.train
    parts = f" in {train.accumulate_steps} parts" if train.accumulate_steps > 1 else ""
    peak = peak_learning_rate(config.optimizer, data.batch_size)
    rows = trainee.describe(variables) | {
        "batch": f"{data.batch_size}{parts}, {total_steps:,} steps = "
        f"{total_steps * data.batch_size / trainee.num_train:,.1f} passes over the data",
        **({"stages": _describe_stages(trainee, stages, total_steps)} if len(stages) > 1 else {}),
        "schedule": f"{config.optimizer.name}, peak rate {peak:.3g}, warm-up {warmup_steps:,} steps",
        "mesh": f"{axes} ({len(mesh.devices.flat)} x {devices[0].device_kind}, {jax.process_count()} process(es))",
    }
    indented = {name: text.replace("\n", f"\n{'':12}") for name, text in rows.items()}
    return "\n".join(f"  {name:<9} {text}" for name, text in indented.items())


def _describe_stages(trainee, stages: tuple[Stage, ...], total_steps: int) -> str:
    ends = [*(stage.first_step for stage in stages[1:]), total_steps]
    flops = [si(trainee.train_flops_at(stage.image_size)) for stage in stages]
    rows = zip(stages, ends, flops, strict=True)
    return "; ".join(f"{size_text(stage.image_size)} up to step {end:,} ({n}FLOP an image)" for stage, end, n in rows)
