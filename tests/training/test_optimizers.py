import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import get_config
from mae_jax.models.mae import MAEConfig, init_params
from mae_jax.training.optimizers import decays, fit_warmup, make_optimizer, make_schedule, peak_learning_rate


def optimizer_settings(**changes):
    settings = get_config().optimizer
    settings.update(changes)
    return settings


@pytest.mark.parametrize("warmup", [0, 1, 40])
@pytest.mark.parametrize("least", [0.0, 1e-5])
def test_the_rate_rises_linearly_from_0_and_falls_as_half_a_cosine_step_by_step(warmup, least):
    schedule = make_schedule(optimizer_settings(min_learning_rate=least), 4096, warmup, 800)
    for step in [*range(60), *range(60, 801, 37), 800]:
        if step < warmup:
            expected = 2.4e-3 * step / warmup
        else:
            expected = least + (2.4e-3 - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (800 - warmup)))
        # The cosine in float32: a rounding of the peak, 2.4e-3 * 6e-8, at most a few times.
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-6, abs=1e-9), step


def test_the_rate_starts_at_exactly_0_and_reaches_peak_and_minimum_at_their_steps():
    schedule = make_schedule(optimizer_settings(min_learning_rate=1e-6), 512, 10, 50)
    assert float(schedule(0)) == 0
    assert float(schedule(10)) == pytest.approx(3e-4, rel=1e-6)
    assert float(schedule(50)) == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize(("warmup", "total", "used"), [(40, 41, 40), (40, 40, 4), (40, 39, 3), (40, 5, 0), (1, 1, 0)])
def test_a_warmup_that_leaves_nothing_to_anneal_becomes_a_tenth_of_the_run(warmup, total, used):
    assert fit_warmup(warmup, total) == used
    schedule = make_schedule(optimizer_settings(), 256, used, total)
    assert float(schedule(used)) == pytest.approx(1.5e-4, rel=1e-6)
    assert float(schedule(total)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("batch_size", "peak"), [(256, 1.5e-4), (4096, 2.4e-3), (64, 3.75e-5)])
def test_the_peak_rate_grows_with_the_batch(batch_size, peak):
    assert peak_learning_rate(optimizer_settings(), batch_size) == pytest.approx(peak, rel=1e-12)


def test_the_default_recipe_is_the_papers():
    # Table 8, and the targets of Table 1d's best row.
    config = get_config()
    settings = config.optimizer
    assert (settings.b1, settings.b2, settings.epsilon, settings.weight_decay) == (0.9, 0.95, 1e-8, 0.05)
    assert (settings.base_learning_rate, settings.warmup_epochs, settings.clip_norm) == (1.5e-4, 40, None)
    assert (config.data.batch_size, config.train.epochs) == (4096, 800)
    assert (config.model.normalize_targets, config.model.mask_ratio) == (True, 0.75)


def test_exactly_kernels_and_tokens_decay():
    model = MAEConfig(8, 4, 1, 8, 2, 2, 2.0, 8, 1, 2)
    mask = decays(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), tokens=True)
    decayed = {"/".join(e.key for e in path) for path, value in jax.tree_util.tree_leaves_with_path(mask) if value}
    blocks = ("attention/out", "attention/qkv", "mlp/fc1", "mlp/fc2")
    assert decayed == {
        *(f"{side}/blocks/{layer}/kernel" for side in ("encoder", "decoder") for layer in blocks),
        "encoder/patch_embed/kernel", "encoder/class_token",
        "decoder/embed/kernel", "decoder/predict/kernel", "decoder/mask_token",
    }  # fmt: skip


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_updates_are_those_of_pytorchs_adamw(clip_norm):
    torch = pytest.importorskip("torch")
    settings = optimizer_settings(weight_decay=0.3)
    if clip_norm:
        settings.clip_norm = clip_norm
    optimizer = make_optimizer(settings, lambda step: 0.01 * (step + 1))
    rng = np.random.default_rng(0)
    shapes = {"kernel": (2, 3, 4), "bias": (2, 4), "scale": (2, 3), "class_token": (1, 1, 4), "mask_token": (1, 1, 3)}
    start = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    params = {"layer": jax.tree.map(jnp.asarray, start)}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [[theirs["kernel"], theirs["class_token"], theirs["mask_token"]], [theirs["bias"], theirs["scale"]]]
    reference = torch.optim.AdamW(
        [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.3, 0.0), strict=True)],
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step in range(10):
        grads = {name: (rng.standard_normal(shape) * 10.0 ** -(step % 3)).astype(np.float32) for name, shape in
                 shapes.items()}  # fmt: skip
        updates, state = update({"layer": grads}, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip_norm)
        for group in reference.param_groups:
            group["lr"] = 0.01 * (step + 1)
        reference.step()
    for name, p in theirs.items():
        # Ten float32 roundings; PyTorch's clipping adds 1e-6 to the norm.
        np.testing.assert_allclose(params["layer"][name], p.detach(), rtol=0, atol=3e-6, err_msg=name)
