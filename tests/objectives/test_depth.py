"""Losses of pictures of many channels at full depth."""

import jax
import numpy as np
import pytest

from configs.common import get_config
from mae_jax.models.mae import MAEConfig
from mae_jax.objectives.pretrain import make_loss_fn
from tests.reference import random_params


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_model_of_13_channels_learns_from_deep_pictures_even_where_these_have_no_data(dtype):
    config = get_config()
    config.model.update(image_size=8, patch_size=4, channels=13, decoder_width=16, decoder_depth=1)
    config.model.update(width=16, depth=1, num_heads=2, decoder_num_heads=2)
    config.data.update(dtype=dtype, mean=tuple(np.linspace(800, 3000, 13)), std=(900.0,))
    pictures = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8, 13)).astype(dtype)
    if dtype == "float32":
        pictures[1, :3] = pictures[2] = np.nan
    model = MAEConfig(**config.model)
    params, loss_fn = random_params(model), make_loss_fn(config, model)

    @jax.jit
    def step(params):
        batch, keys = {"image": pictures}, jax.random.split(jax.random.key(0), 4)
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, {}, batch, keys)
        return loss, jax.tree.map(lambda x, grad: x - 1e-2 * grad, params, grads)

    first, params = step(params)
    second, params = step(params)
    assert 0 < second < first
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
