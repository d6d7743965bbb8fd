"""What will run, told before it runs."""

import jax
import ml_collections
from jax.sharding import Mesh

from mae_jax.models.flops import forward_flops, train_flops
from mae_jax.models.mae import MAEConfig, count_parameters
from mae_jax.models.masking import num_visible
from mae_jax.training.optimizers import peak_learning_rate


def summarize(
    config: ml_collections.ConfigDict,
    model: MAEConfig,
    params,
    mesh: Mesh,
    *,
    num_train: int,
    num_eval: int,
    warmup_steps: int,
    total_steps: int,
) -> str:
    """Model, parameters, tokens, FLOPs, data, schedule and mesh, a line each. `params` may be abstract."""
    height, width = model.image_size
    visible = num_visible(model.num_patches, model.mask_ratio)
    encoder, decoder = count_parameters(params["encoder"]), count_parameters(params["decoder"])
    devices = mesh.devices.flat
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    data, train = config.data, config.train
    parts = f" in {train.accumulate_steps} parts" if train.accumulate_steps > 1 else ""
    peak = peak_learning_rate(config.optimizer, data.batch_size)
    rows = {
        "encoder": f"{model.depth} blocks x {model.width}, {model.num_heads} heads, {encoder:,} parameters",
        "decoder": f"{model.decoder_depth} blocks x {model.decoder_width}, {model.decoder_num_heads} heads, "
        f"{decoder:,} parameters",
        "images": f"{height} x {width} x {model.channels}, patch {model.patch_size}: {model.num_patches} patches, "
        f"{visible} visible (mask ratio {model.mask_ratio})",
        "tokens": f"encoder {visible} + 1, decoder {model.num_patches} + 1",
        "compute": f"{_si(forward_flops(model))}FLOP forward, {_si(train_flops(model))}FLOP a training image, "
        f"{model.dtype} products",
        "data": f"{data.name}: {num_train:,} training and {num_eval:,} evaluation images",
        "batch": f"{data.batch_size}{parts}, {total_steps:,} steps = "
        f"{total_steps * data.batch_size / num_train:,.1f} passes over the data",
        "schedule": f"peak rate {peak:.3g}, warm-up {warmup_steps:,} steps",
        "mesh": f"{axes} ({len(mesh.devices.flat)} x {devices[0].device_kind}, {jax.process_count()} process(es))",
    }
    return "\n".join(f"  {name:<9} {text}" for name, text in rows.items())


def _si(value: float) -> str:
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} T"
