"""Optimizers and learning-rate schedules; which parameters decay, and which learn more slowly."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mae_jax.settings.registry import Registry

Mask = Callable[[dict], dict]  # parameters -> True for those with weight decay

# (settings `optimizer.*`, schedule, mask) -> transformation of gradients; clipping and layer-wise rates come on top.
OPTIMIZERS: Registry[Callable[[ConfigDict, optax.Schedule, Mask], optax.GradientTransformation]]
OPTIMIZERS = Registry("optimizer.name")
# (settings `optimizer.*`, peak rate, steps) -> the schedule after the warm-up, which counts from the warm-up's end.
SCHEDULES: Registry[Callable[[ConfigDict, float, int], optax.Schedule]]
SCHEDULES = Registry("optimizer.schedule")

TOKENS = ("class_token", "mask_token", "registers")
MUON_RMS = 0.2  # root mean square of Muon's updates at rate 1, about AdamW's (arXiv 2502.16982, section 2.2)


def peak_learning_rate(settings: ConfigDict, batch_size: int) -> float:
    """base rate x batch / 256: the linear scaling rule (paper, Table 8)."""
    return settings.base_learning_rate * batch_size / 256


def fit_warmup(warmup_steps: int, total_steps: int) -> int:
    """The warm-up that is asked for, or a tenth of a run that is no longer: so a long recipe can be tried briefly."""
    return warmup_steps if warmup_steps < total_steps else total_steps // 10


def make_schedule(settings: ConfigDict, batch_size: int, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear from 0 over the warm-up, then as `optimizer.schedule` says, step by step."""
    peak = peak_learning_rate(settings, batch_size)
    after = SCHEDULES.find(settings.schedule)(settings, peak, total_steps - warmup_steps)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


@SCHEDULES.register("cosine")
def _cosine(settings: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """Half a cosine down to the minimum."""
    return optax.cosine_decay_schedule(peak, steps, alpha=settings.min_learning_rate / peak if peak else 0.0)


@SCHEDULES.register("constant")
def _constant(settings: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


@SCHEDULES.register("warmup_stable_decay")
def _warmup_stable_decay(settings: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """Constant, then a straight line down to the minimum (arXiv 2404.06395, section 4; 2405.18392)."""
    decay_steps = max(1, round(settings.decay_fraction * steps))
    decay = optax.linear_schedule(peak, settings.min_learning_rate, decay_steps)
    return optax.join_schedules([optax.constant_schedule(peak), decay], [steps - decay_steps])


def decays(params: dict, *, tokens: bool) -> dict:
    """True for every parameter with weight decay: kernels, and if `tokens` the class and mask tokens and registers.

    Decided by name, because a stack of blocks gives every parameter one more axis.
    """
    names = ("kernel", *TOKENS) if tokens else ("kernel",)
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def layer_scales(params: dict, layer_decay: float) -> dict:
    """Factor of each parameter's learning rate, with the layers of BEiT (Bao et al. 2021, arXiv 2106.08254).

    The embeddings are layer 0, block i is layer i + 1; the final norm and the head come last, with factor 1. Each layer
    has `layer_decay` times the factor of the one above it; stacked blocks get a vector over their leading axis. If only
    the last blocks are among `params`, their factors are the same.
    """
    stacks = jax.tree.leaves(params.get("encoder", {}).get("blocks", {}))
    depth = len(stacks[0]) if stacks else 0  # embeddings are here only if all blocks are

    def scale(path, leaf):
        part, name = path[0].key, path[1].key
        if part != "encoder" or name == "norm":
            return jnp.ones(())
        if name == "blocks":
            factors = layer_decay ** jnp.arange(len(leaf), 0, -1, dtype=jnp.float32)
            return factors.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.float32(layer_decay ** (depth + 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def make_optimizer(
    settings: ConfigDict, schedule: optax.Schedule, *, decay_tokens: bool = True
) -> optax.GradientTransformation:
    """The optimizer of `optimizer.name`, after clipping by the gradient's global norm, with layer-wise rates if set.

    Clipping and layer-wise rates have no state, so that a run may turn them on or off when it goes on.
    """
    mask = functools.partial(decays, tokens=decay_tokens)
    inner = OPTIMIZERS.find(settings.name)(settings, schedule, mask)
    clip = optax.identity() if settings.clip_norm is None else optax.clip_by_global_norm(settings.clip_norm)

    def update(grads, state, params):
        grads, _ = clip.update(grads, clip.init(params))
        updates, state = inner.update(grads, state, params)
        if settings.layer_decay != 1:
            updates = jax.tree.map(jnp.multiply, updates, layer_scales(params, settings.layer_decay))
        return updates, state

    return optax.GradientTransformation(inner.init, update)


@OPTIMIZERS.register("adamw")
def _adamw(settings: ConfigDict, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """AdamW with decoupled decay, p -= rate x decay x p (as PyTorch's)."""
    return optax.adamw(
        schedule, b1=settings.b1, b2=settings.b2, eps=settings.epsilon, weight_decay=settings.weight_decay, mask=mask
    )


def is_block_matrix(path: tuple) -> bool:
    """Whether the parameter with this path in a tree is a kernel of stacked blocks, [depth, inputs, ..., outputs]."""
    names = [getattr(entry, "key", None) for entry in path]
    return "blocks" in names and names[-1] == "kernel"


@OPTIMIZERS.register("muon")
def _muon(settings: ConfigDict, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, AdamW for all else: the input and output layers, tokens, biases, norms.

    Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) orthogonalises the Nesterov momentum of each block's
    matrices, queries, keys and values one by one. With the scale of Liu et al. 2025 (arXiv 2502.16982, section 2.2) and
    decoupled decay it takes AdamW's rate and decay. (`optax.contrib.muon` would decay biases and norms too.)
    """

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if is_block_matrix(path) else "adamw", params)

    def dimensions(updates):  # all axes but these two count matrices
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=-1), updates)

    def scale(update, _):  # an orthogonal matrix has a root mean square of 1 / sqrt(its longer side)
        return MUON_RMS * math.sqrt(max(update.shape[1], update.shape[-1])) * update

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=settings.muon_momentum, weight_dimension_numbers=dimensions),
        optax.stateless_with_tree_map(scale),
        optax.add_decayed_weights(settings.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(settings, schedule, mask)}, labels)


@OPTIMIZERS.register("lars")
def _lars(settings: ConfigDict, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """LARS (You et al. 2017, arXiv 1708.03888) as MoCo v3 has it: the rate comes after the momentum, not inside it.

    Decay and trust ratio apply to matrices and to the attentive pool's query, not to biases and norms.
    """

    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=matrices),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=settings.trust_coefficient), matrices),
        optax.trace(decay=settings.momentum),
        optax.scale_by_learning_rate(schedule),
    )
