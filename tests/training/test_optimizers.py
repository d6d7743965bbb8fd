import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.common import get_config
from mae_jax.models.classifier import ClassifierConfig, init_classifier, split_classifier
from mae_jax.models.mae import MAEConfig, init_params
from mae_jax.training.optimizers import (
    decays,
    fit_warmup,
    layer_scales,
    make_optimizer,
    make_schedule,
    peak_learning_rate,
)


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


def test_the_rate_changes_at_every_step_of_an_epoch_and_keeps_its_minimum_at_the_end():
    # 5 epochs of 10 steps, the first a warm-up: base rate 1e-3 at batch 512, minimum 1e-5.
    schedule = make_schedule(optimizer_settings(base_learning_rate=1e-3, min_learning_rate=1e-5), 512, 10, 50)
    rates = [float(schedule(step)) for step in range(50)]
    assert rates[:10] == pytest.approx([2e-4 * step for step in range(10)], rel=1e-6)
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert rates[20] == pytest.approx(1e-5 + 1.99e-3 * (1 + math.sqrt(0.5)) / 2, rel=1e-6)  # a quarter of the way
    assert rates[30] == pytest.approx(1e-5 + 1.99e-3 / 2, rel=1e-6)
    assert float(schedule(60)) == pytest.approx(1e-5, rel=1e-5)


def test_a_constant_schedule_stays_at_the_peak_after_the_warmup():
    schedule = make_schedule(optimizer_settings(schedule="constant", min_learning_rate=1e-5), 512, 10, 50)
    rates = [float(schedule(step)) for step in range(51)]
    assert rates == pytest.approx([3e-4 * min(step / 10, 1) for step in range(51)], rel=1e-6)


@pytest.mark.parametrize("share, first", [(0.25, 40), (1.0, 10), (0.001, 49)])
def test_warmup_stable_decay_is_constant_and_then_falls_in_a_line_to_the_minimum(share, first):
    changes = {"schedule": "warmup_stable_decay", "decay_fraction": share, "min_learning_rate": 1e-5}
    schedule = make_schedule(optimizer_settings(**changes), 512, 10, 50)
    for step in range(51):
        expected = 3e-4 * min(step / 10, 1)
        if step > first:
            expected = 3e-4 + (1e-5 - 3e-4) * (step - first) / (50 - first)
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-10), step


def test_a_schedule_or_an_optimizer_of_ones_own_is_imported(tmp_path, monkeypatch):
    (tmp_path / "own_training.py").write_text(
        "import optax\n"
        "def halved(settings, peak, steps):\n    return lambda step: peak / 2\n"
        "def plain(settings, schedule, mask):\n    return optax.sgd(schedule)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = optimizer_settings(schedule="own_training:halved", name="own_training:plain")
    schedule = make_schedule(settings, 256, 2, 8)
    assert [float(schedule(step)) for step in (1, 2, 7)] == pytest.approx([7.5e-5, 7.5e-5, 7.5e-5])
    params = {"encoder": {"kernel": jnp.ones(2)}}
    optimizer = make_optimizer(settings, schedule)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["encoder"]["kernel"], 0.0)


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


def test_registers_decay_and_norms_of_heads_do_not_as_the_other_tokens_and_norms():
    model = MAEConfig(8, 4, 1, 8, 2, 2, 2.0, 8, 1, 2, class_tokens=2, registers=2, qk_norm=True)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    encoder = decays(shapes, tokens=True)["encoder"]
    assert encoder["registers"] and encoder["class_token"]
    assert not encoder["blocks"]["attention"]["q_norm"]["scale"]
    assert not decays(shapes, tokens=False)["encoder"]["registers"]


def test_in_fine_tuning_neither_tokens_nor_positions_decay():
    classifier = ClassifierConfig(MAEConfig(8, 4, 1, 8, 2, 2, 2.0, 8, 1, 2), 3, pool="attentive")
    mask = decays(jax.eval_shape(lambda: init_classifier(classifier, jax.random.key(0))[0]), tokens=False)
    decayed = {"/".join(e.key for e in path) for path, value in jax.tree_util.tree_leaves_with_path(mask) if value}
    blocks = ("attention/out", "attention/qkv", "mlp/fc1", "mlp/fc2")
    assert decayed == {
        *(f"encoder/blocks/{layer}/kernel" for layer in blocks), "encoder/patch_embed/kernel",
        "head/pool/key/kernel", "head/pool/value/kernel", "head/linear/kernel",
    }  # fmt: skip


@pytest.mark.parametrize("decay_tokens", [True, False])
def test_a_step_without_gradient_shrinks_what_decays_by_rate_times_decay(decay_tokens):
    params = {"encoder": {name: jnp.ones((1, 1, 4)) for name in ("class_token", "positions", "kernel", "bias")}}
    optimizer = make_optimizer(optimizer_settings(weight_decay=0.5), lambda _: 0.1, decay_tokens=decay_tokens)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    expected = {"class_token": -0.05 if decay_tokens else 0, "positions": 0, "kernel": -0.05, "bias": 0}
    for name, value in expected.items():
        np.testing.assert_allclose(updates["encoder"][name], value, rtol=1e-6, err_msg=name)


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


# ------------------------------------------------------------------------------------------------- layer decay


@pytest.mark.parametrize(
    ("depth", "layer_decay", "embeddings"), [(12, 0.65, 0.003697), (24, 0.75, 0.000753), (32, 0.75, 0.000075)]
)
def test_each_block_has_its_share_of_the_rate_of_the_block_after_it(depth, layer_decay, embeddings):
    classifier = ClassifierConfig(MAEConfig(8, 4, 1, 8, depth, 2, 2.0, 8, 1, 2), 3, pool="attentive", batch_norm=True)
    shapes = jax.eval_shape(lambda: init_classifier(classifier, jax.random.key(0))[0])
    scales = layer_scales(shapes, layer_decay)
    encoder = scales.pop("encoder")
    expected = [layer_decay ** (depth - block) for block in range(depth)]
    blocks = jax.tree.leaves(encoder.pop("blocks"))
    for leaf, shape in zip(blocks, jax.tree.leaves(shapes["encoder"]["blocks"]), strict=True):
        assert np.broadcast_shapes(leaf.shape, shape.shape) == shape.shape
        np.testing.assert_allclose(np.ravel(leaf), expected, rtol=1e-5)
    assert all(leaf == 1 for leaf in jax.tree.leaves((encoder.pop("norm"), scales)))
    assert encoder.keys() == {"patch_embed", "class_token", "positions"}
    for leaf in jax.tree.leaves(encoder):
        assert round(float(leaf), 6) == embeddings


@pytest.mark.parametrize("trained_blocks", [0, 0.5, 1, 3])
def test_the_last_blocks_alone_have_the_factors_that_they_have_among_all(trained_blocks):
    classifier = ClassifierConfig(MAEConfig(8, 4, 1, 8, 5, 2, 2.0, 8, 1, 2), 3, trained_blocks=trained_blocks)
    params, _ = init_classifier(classifier, jax.random.key(0))
    whole = jax.tree.map(jnp.multiply, jax.tree.map(jnp.ones_like, params), layer_scales(params, 0.5))
    expected, _ = split_classifier(classifier, whole)
    trained, _ = split_classifier(classifier, params)
    found = jax.tree.map(jnp.multiply, jax.tree.map(jnp.ones_like, trained), layer_scales(trained, 0.5))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_adamw_with_layer_decay_is_that_of_pytorch_with_a_group_for_each_layer():
    torch = pytest.importorskip("torch")
    decay, layer_decay, depth, width = 0.4, 0.6, 3, 4
    settings = optimizer_settings(
        base_learning_rate=0.02, min_learning_rate=1e-3, weight_decay=decay, layer_decay=layer_decay, b2=0.999
    )
    schedule = make_schedule(settings, 256, 2, 6)
    rng = np.random.default_rng(0)
    shapes = {
        "encoder": {
            "patch_embed": {"kernel": (6, width), "bias": (width,)},
            "class_token": (1, 1, width),
            "positions": (3, width),
            "blocks": {"mlp": {"kernel": (depth, width, 8), "bias": (depth, 8)}},
            "norm": {"scale": (width,)},
        },
        "head": {"linear": {"kernel": (width, 3), "bias": (3,)}},
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731

    def draw():
        return jax.tree.map(lambda shape: rng.standard_normal(shape).astype(np.float32), shapes, is_leaf=is_shape)

    # (path, block or None, layer): a layer's factor is layer_decay ** (depth + 1 - layer).
    places = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes, is_leaf=is_shape):
        names = tuple(entry.key for entry in path)
        if "blocks" in names:
            places += [(names, block, block + 1) for block in range(leaf[0])]
        else:
            places.append((names, None, depth + 1 if names[0] == "head" or names[1] == "norm" else 0))

    def part(tree, names, block):
        for name in names:
            tree = tree[name]
        return np.asarray(tree if block is None else tree[block])

    params = jax.tree.map(jnp.asarray, start := draw())
    theirs = {place[:2]: torch.nn.Parameter(torch.tensor(part(start, *place[:2]))) for place in places}
    groups = [
        {
            "params": [theirs[names, block]],
            "weight_decay": decay if names[-1] == "kernel" else 0.0,
            "factor": layer_decay ** (depth + 1 - layer),
        }
        for names, block, layer in places
    ]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    optimizer = make_optimizer(settings, schedule, decay_tokens=False)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    rates = [0, 0.01, 0.02, *(1e-3 + 0.019 * (1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2))]
    for rate in rates:
        grads = draw()
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for (names, block), parameter in theirs.items():
            parameter.grad = torch.tensor(part(grads, names, block))
        for group in reference.param_groups:
            group["lr"] = rate * group["factor"]
        reference.step()
    for (names, block), parameter in theirs.items():
        # Five float32 roundings of values of about 1.
        np.testing.assert_allclose(part(params, names, block), parameter.detach(), rtol=0, atol=2e-6, err_msg=names)


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_clipping_and_layer_decay_can_be_turned_on_in_the_middle_of_a_run(name):
    classifier = ClassifierConfig(MAEConfig(8, 4, 1, 8, 2, 2, 2.0, 8, 1, 2), 3)
    params = jax.eval_shape(lambda: init_classifier(classifier, jax.random.key(0))[0])

    def state_of(**changes):
        settings = optimizer_settings(name=name, **changes)
        return jax.eval_shape(make_optimizer(settings, lambda _: 0.1).init, params)

    assert state_of() == state_of(clip_norm=1.0, layer_decay=0.5, weight_decay=0.0)
