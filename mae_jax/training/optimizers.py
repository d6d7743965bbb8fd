"""Optimizers, learning-rate schedules, weight decay and layer-wise learning rates."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mae_jax.settings.registry import Registry

Mask = Callable[[dict], dict]  # parameters -> True for those with weight decay

# (settings `optimizer.*`, schedule, mask) -> optimizer, without clipping and layer-wise rates.
OPTIMIZERS: Registry[Callable[..., optax.GradientTransformation]] = Registry("optimizer.name")
# (settings `optimizer.*`, peak rate, steps) -> schedule after the warm-up, with steps counted from its end.
SCHEDULES: Registry[Callable[[ConfigDict, float, int], optax.Schedule]] = Registry("optimizer.schedule")

MUON_RMS = 0.2  # root mean square of Muon's updates at rate 1, about AdamW's (arXiv 2502.16982, section 2.2)


def peak_learning_rate(settings: ConfigDict, batch_size: int) -> float:
    """The linear scaling rule, base rate x batch / 256 (paper, Table 8)."""
    return settings.base_learning_rate * batch_size / 256


def fit_warmup(warmup_steps: int, total_steps: int) -> int:
    """The warm-up as set, or a tenth of a run that is not longer, so that long recipes can be tried briefly."""
    return warmup_steps if warmup_steps < total_steps else total_steps // 10


def make_schedule(settings: ConfigDict, batch_size: int, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Step -> learning rate: linear warm-up from 0, then `optimizer.schedule`."""
    peak = peak_learning_rate(settings, batch_size)
    after = SCHEDULES.find(settings.schedule)(settings, peak, total_steps - warmup_steps)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps])


@SCHEDULES.register("cosine")
def _cosine(settings: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, steps, alpha=settings.min_learning_rate / peak if peak else 0.0)


@SCHEDULES.register("constant")
def _constant(settings: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


@SCHEDULES.register("warmup_stable_decay")
def _warmup_stable_decay(settings: ConfigDict, peak: float, steps: int) -> optax.Schedule:
    """Constant, then linear down to the minimum (arXiv 2404.06395, section 4; 2405.18392)."""
    decay_steps = max(1, round(settings.decay_fraction * steps))
    decay = optax.linear_schedule(peak, settings.min_learning_rate, decay_steps)
    return optax.join_schedules([optax.constant_schedule(peak), decay], [steps - decay_steps])


def decays(params: dict, *, tokens: bool) -> dict:
    """True for parameters with weight decay: kernels and, if `tokens`, class tokens, mask tokens and registers."""
    names = ("kernel", "class_token", "mask_token", "registers") if tokens else ("kernel",)
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)


def layer_scales(params: dict, layer_decay: float) -> dict:
    """Factors of the learning rate for layer-wise decay, as in BEiT (Bao et al. 2021, arXiv 2106.08254).

    Each layer has `layer_decay` times the factor of the next one: embeddings, each block (a vector over the leading
    axis of stacks, which may be only the last blocks), and the final norm and the head with factor 1.
    """
    stacks = jax.tree.leaves(params.get("encoder", {}).get("blocks", {}))
    depth = len(stacks[0]) if stacks else 0  # embeddings are present only if all blocks are

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
    """The optimizer `optimizer.name`, with global-norm clipping before and layer-wise rates after it, if set."""
    mask = functools.partial(decays, tokens=decay_tokens)
    inner = OPTIMIZERS.find(settings.name)(settings, schedule, mask)
    clip = optax.identity() if settings.clip_norm is None else optax.clip_by_global_norm(settings.clip_norm)

    def update(grads, state, params):  # clipping and layer-wise rates are stateless: a resumed run may change them
        grads, _ = clip.update(grads, clip.init(params))
        updates, state = inner.update(grads, state, params)
        if settings.layer_decay != 1:
            updates = jax.tree.map(jnp.multiply, updates, layer_scales(params, settings.layer_decay))
        return updates, state

    return optax.GradientTransformation(inner.init, update)


@OPTIMIZERS.register("adamw")
def _adamw(settings: ConfigDict, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """AdamW with decoupled decay, p -= rate x decay x p, as in PyTorch."""
    return optax.adamw(
        schedule, b1=settings.b1, b2=settings.b2, eps=settings.epsilon, weight_decay=settings.weight_decay, mask=mask
    )


@OPTIMIZERS.register("muon")
def _muon(settings: ConfigDict, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the blocks' matrices, AdamW for the rest.

    It orthogonalises the Nesterov momentum of each matrix, also of queries, keys and values alone. The scale of Liu et
    al. 2025 (arXiv 2502.16982, section 2.2) and decoupled decay allow AdamW's rate and decay. (`optax.contrib.muon`
    would decay biases and norms too.)
    """

    def label(path, _):  # stacked kernels are [depth, inputs, ..., outputs]
        names = [getattr(entry, "key", None) for entry in path]
        return "muon" if "blocks" in names and names[-1] == "kernel" else "adamw"

    def dimensions(updates):  # the remaining axes enumerate matrices
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=-1), updates)

    def scale(update, _):  # the RMS of an orthogonal matrix is 1 / sqrt(longer side)
        return MUON_RMS * math.sqrt(max(update.shape[1], update.shape[-1])) * update

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=settings.muon_momentum, weight_dimension_numbers=dimensions),
        optax.stateless_with_tree_map(scale),
        optax.add_decayed_weights(settings.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.partition({"muon": muon, "adamw": _adamw(settings, schedule, mask)}, labels)


@OPTIMIZERS.register("lars")
def _lars(settings: ConfigDict, schedule: optax.Schedule, mask: Mask) -> optax.GradientTransformation:
    """LARS (arXiv 1708.03888) as in MoCo v3, with the learning rate applied after the momentum; biases stay apart."""

    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=matrices),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=settings.trust_coefficient), matrices),
        optax.trace(decay=settings.momentum),
        optax.scale_by_learning_rate(schedule),
    )
