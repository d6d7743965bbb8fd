"""AdamW, its learning-rate schedule, and which parameters decay."""

import jax
import optax
from ml_collections import ConfigDict


def peak_learning_rate(settings: ConfigDict, batch_size: int) -> float:
    """base rate x batch / 256: the linear scaling rule (paper, Table 8)."""
    return settings.base_learning_rate * batch_size / 256


def fit_warmup(warmup_steps: int, total_steps: int) -> int:
    """The warm-up that is used: the one asked for, or a tenth of the run if that would leave nothing to anneal.

    So a recipe of hundreds of epochs can be tried for a few steps.
    """
    return warmup_steps if warmup_steps < total_steps else total_steps // 10


def make_schedule(settings: ConfigDict, batch_size: int, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear from 0 over the warm-up, then half a cosine down to the minimum, step by step."""
    peak = peak_learning_rate(settings, batch_size)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps, settings.min_learning_rate)


def decays(params: dict) -> dict:
    """True for every parameter with weight decay: kernels and the class and mask tokens, not biases and norms.

    Decided by name, because a stack of blocks gives every parameter one more axis.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "class_token", "mask_token"), params
    )


def make_optimizer(settings: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with decoupled decay, p -= rate x decay x p (as PyTorch's), after clipping by the global norm if set."""
    adamw = optax.adamw(
        schedule, b1=settings.b1, b2=settings.b2, eps=settings.epsilon, weight_decay=settings.weight_decay, mask=decays
    )
    if settings.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
