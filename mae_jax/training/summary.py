"""What will run, told before it runs."""

import jax
import ml_collections
from jax.sharding import Mesh

from mae_jax.training.optimizers import peak_learning_rate
from mae_jax.training.state import Variables


def summarize(
    config: ml_collections.ConfigDict,
    trainee,
    variables: Variables,
    mesh: Mesh,
    *,
    warmup_steps: int,
    total_steps: int,
) -> str:
    """The task's own rows, then data, schedule and mesh, a line each. `variables` may be abstract."""
    devices = mesh.devices.flat
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    data, train = config.data, config.train
    parts = f" in {train.accumulate_steps} parts" if train.accumulate_steps > 1 else ""
    peak = peak_learning_rate(config.optimizer, data.batch_size)
    rows = trainee.describe(variables) | {
        "data": f"{data.name}: {trainee.num_train:,} training and {trainee.num_eval:,} evaluation images",
        "batch": f"{data.batch_size}{parts}, {total_steps:,} steps = "
        f"{total_steps * data.batch_size / trainee.num_train:,.1f} passes over the data",
        "schedule": f"{config.optimizer.name}, peak rate {peak:.3g}, warm-up {warmup_steps:,} steps",
        "mesh": f"{axes} ({len(mesh.devices.flat)} x {devices[0].device_kind}, {jax.process_count()} process(es))",
    }
    return "\n".join(f"  {name:<9} {text}" for name, text in rows.items())


def si(value: float) -> str:
    """A number with three digits and a prefix: 5.68e7 -> "56.8 M"."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"
