"""The model against Hugging Face's ViTMAEForPreTraining, and against plain NumPy where that cannot follow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import get_config
from mae_jax.models.mae import MAEConfig, make_bind
from mae_jax.models.positions import sincos_table
from mae_jax.objectives.objective import LossDetails, Variables
from mae_jax.training.optimizers import make_optimizer, make_schedule
from mae_jax.training.step import make_init, make_train_step
from tests.meshes import device_mesh
from tests.reference import (
    create_hf_model,
    from_hf_state,
    leaves_by_block,
    loop_positions,
    max_relative,
    numpy_encode,
    numpy_mae,
    random_batch,
    random_params,
    to_hf_state,
)

# Every setting that changes the forward pass differs between at least two of them.
MODELS = {
    "rgb, normalised": MAEConfig(12, 4, 3, 16, 2, 2, 4.0, 12, 1, 3, 0.75, True, 1e-6),
    "grey, plain": MAEConfig(8, 2, 1, 24, 3, 4, 2.0, 16, 2, 2, 0.5, False, 1e-12),
    "rgb, plain, wide norms": MAEConfig(20, 5, 3, 32, 2, 4, 3.0, 8, 1, 1, 0.6, False, 1e-2),
    "grey, normalised, odd MLP": MAEConfig(15, 3, 1, 12, 1, 1, 1.3, 20, 2, 5, 0.2, True, 1e-12),
}


@functools.cache
def both_programs(name):
    """((loss, prediction, gradients by name) of ours, the same of theirs): same weights, images and noise."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = MODELS[name]
    params, (images, noise) = random_params(config), random_batch(config, 3)

    def loss_fn(params):
        output = make_bind(config)(params)(images, noise=noise)
        return output.loss, output

    (loss, output), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(jax.tree.map(jnp.asarray, params))

    tables = [sincos_table(config.grid, width) for width in (config.width, config.decoder_width)]
    model = create_hf_model(params, config, tables)
    theirs = model(torch.tensor(images.transpose(0, 3, 1, 2)), noise=torch.tensor(noise))
    theirs.loss.backward()
    their_grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.requires_grad}
    return (loss, output, leaves_by_block(grads)), (theirs, from_hf_state(their_grads, config))


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_predictions_are_those_of_hugging_face(name):
    (loss, output, _), (theirs, _) = both_programs(name)
    # 1e-5 is about a hundred roundings of float32; two orders of summation make about ten (1e-6).
    assert max_relative(loss, theirs.loss.detach()) < 1e-5
    assert max_relative(output.prediction, theirs.logits.detach()) < 1e-5
    np.testing.assert_array_equal(output.mask, theirs.mask)
    np.testing.assert_array_equal(output.ids_restore, theirs.ids_restore)


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_of_every_parameter_is_that_of_hugging_face(name):
    (*_, grads), (_, their_grads) = both_programs(name)
    assert grads.keys() == their_grads.keys()
    for parameter, grad in grads.items():
        assert np.max(np.abs(grad)) > 0, parameter
        assert max_relative(grad, their_grads[parameter]) < 1e-5, parameter


def test_the_conversion_of_weights_to_hugging_face_loses_nothing():
    config = MODELS["rgb, normalised"]
    params = random_params(config)
    back = from_hf_state(to_hf_state(params, config), config)
    for name, value in leaves_by_block(params).items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.slow
def test_five_adamw_steps_end_where_those_of_pytorch_do():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = MODELS["rgb, normalised"]
    params, batches = random_params(config), [random_batch(config, 4, seed) for seed in range(5)]
    settings = get_config().optimizer
    # Large enough for decay and update to show: without the decay the losses soon part by 1e-3.
    settings.update(base_learning_rate=1e-2, weight_decay=0.5)
    schedule = make_schedule(settings, batch_size=256, warmup_steps=2, total_steps=8)

    def loss_fn(params, frozen, batch, keys):
        return make_bind(config)(params)(batch["image"], noise=batch["noise"]).loss, LossDetails()

    optimizer = make_optimizer(settings, schedule)
    step = jax.jit(make_train_step(loss_fn, optimizer, schedule, device_mesh(1)))
    state = make_init(lambda _: Variables(jax.tree.map(jnp.asarray, params)), optimizer)(jax.random.key(0))

    tables = [loop_positions(*config.grid, width).astype(np.float32) for width in (config.width, config.decoder_width)]
    model = create_hf_model(params, config, tables)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = {name for name in trained if name.endswith("bias") or "norm" in name}
    groups = [
        {"params": [p for name, p in trained.items() if name not in plain], "weight_decay": 0.5},
        {"params": [p for name, p in trained.items() if name in plain], "weight_decay": 0.0},
    ]
    torch_optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    rates = [0, 5e-3, 1e-2, 1e-2 * (1 + np.cos(np.pi / 6)) / 2, 1e-2 * (1 + np.cos(np.pi / 3)) / 2]
    for (images, noise), rate in zip(batches, rates, strict=True):
        state, scalars = step(state, {"image": images, "noise": noise}, jax.random.key(0))
        for group in torch_optimizer.param_groups:
            group["lr"] = rate
        torch_optimizer.zero_grad()
        loss = model(torch.tensor(images.transpose(0, 3, 1, 2)), noise=torch.tensor(noise)).loss
        loss.backward()
        torch_optimizer.step()
        assert max_relative(scalars["loss"], loss.detach()) < 1e-5

    ours = leaves_by_block(state.params)
    theirs = from_hf_state({name: p.detach().numpy() for name, p in trained.items()}, config)
    for name, value in ours.items():
        expected = theirs[name]
        if name.endswith("qkv/bias"):
            # The key's bias has no influence (softmax): its gradient is rounding noise, which Adam blows up to steps.
            value, expected = value[::2], expected[::2]
        assert max_relative(value, expected) < 1e-5, name


@pytest.mark.slow
def test_vit_base_predicts_what_hugging_face_does():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    config = MAEConfig()
    params, (images, noise) = random_params(config), random_batch(config, 1)
    tables = [sincos_table(config.grid, width) for width in (768, 512)]
    with torch.no_grad():
        model = create_hf_model(params, config, tables)
        theirs = model(torch.tensor(images.transpose(0, 3, 1, 2)), noise=torch.tensor(noise))
    ours = jax.jit(lambda params: make_bind(config)(params)(images, noise=noise))(params)
    assert max_relative(ours.loss, theirs.loss) < 1e-5
    assert max_relative(ours.prediction, theirs.logits) < 1e-5


# Grids that are not square (Hugging Face fails at them), wide and high, and one of a single row.
@pytest.mark.parametrize("image_size", [(8, 20), (12, 4), (4, 16)])
def test_loss_predictions_and_features_of_any_grid_are_those_of_plain_numpy(image_size):
    config = MAEConfig(image_size, 4, 2, 16, 2, 2, 2.5, 12, 1, 3, 0.5, True, 1e-6)
    params, (images, noise) = random_params(config), random_batch(config, 2)

    @jax.jit
    def run(params):
        model = make_bind(config)(params)
        return model(images, noise=noise), model.encode(images)

    output, features = run(params)
    loss, prediction = numpy_mae(params, config, images, noise)
    assert max_relative(output.loss, loss) < 1e-5
    assert max_relative(output.prediction, prediction) < 1e-5
    assert max_relative(features, numpy_encode(params, config, images)) < 1e-5
