"""With all options off, the model is the paper's: the same bits and operations as the paper's model written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from mae_jax.models.mae import MAEConfig, make_bind
from mae_jax.models.masking import take_patches
from mae_jax.models.patches import patchify
from mae_jax.models.positions import sincos_table
from mae_jax.models.targets import normalize_patches
from mae_jax.runtime.platform import attention
from tests.reference import drawn_masks, random_batch, random_params

CONFIG = MAEConfig((12, 16), 4, 3, 16, 3, 2, 4.0, 12, 2, 3)


def plain_blocks(blocks, x, heads, dtype):
    graphdef, stacked = nnx.split(blocks)

    def apply(x, parameters):
        block = nnx.merge(graphdef, parameters)
        queries, keys, values = jnp.split(block.attention.qkv(block.norm1(x)), 3, axis=-1)
        queries = queries * (queries.shape[-1] // heads) ** -0.5
        q, k, v = (rearrange(part, "b n (h d) -> b n h d", h=heads) for part in (queries, keys, values))
        x = x + block.attention.out(rearrange(attention(q, k, v), "b n h d -> b n (h d)"))
        return x + block.mlp(block.norm2(x)), None

    return jax.lax.scan(apply, x.astype(dtype), stacked)[0]


def plain_loss(config, params, images, keys):
    """The paper's masked autoencoder, and nothing else."""
    model = make_bind(config)(params)
    encoder, decoder = model.encoder, model.decoder
    patches = patchify(images, config.patch_size)
    masks = drawn_masks(keys, config.grid, config.mask_ratio)
    positions = take_patches(jnp.asarray(sincos_table(config.grid, config.width))[1:], masks.ids_keep)
    x = encoder.patch_embed(take_patches(patches, masks.ids_keep)) + positions
    x = jnp.concatenate([jnp.broadcast_to(encoder.class_token[...], (len(x), 1, config.width)), x], axis=1)
    x = decoder.embed(encoder.norm(plain_blocks(encoder.blocks, x, config.num_heads, config.dtype)))
    hidden = jnp.broadcast_to(decoder.mask_token[...], (*masks.ids_hidden.shape, config.decoder_width))
    tokens = take_patches(jnp.concatenate([x[:, 1:], hidden], axis=1), masks.ids_restore)
    x = jnp.concatenate([x[:, :1], tokens], axis=1) + jnp.asarray(sincos_table(config.grid, config.decoder_width))
    x = plain_blocks(decoder.blocks, x, config.decoder_num_heads, config.dtype)
    prediction = decoder.predict(decoder.norm(x[:, 1:])).astype(jnp.float32)
    error = jnp.mean((prediction - normalize_patches(patches)) ** 2, axis=-1)
    return jnp.mean(jnp.sum(error * masks.mask, axis=1) / jnp.sum(masks.mask, axis=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_all_options_off_loss_and_gradients_have_the_bits_and_operations_of_the_plain_model(dtype):
    config = dataclasses.replace(CONFIG, dtype=dtype)
    losses = [
        lambda params, images, keys: make_bind(config)(params).training_loss(images, keys)[0],
        lambda params, images, keys: plain_loss(config, params, images, keys),
    ]
    arguments = random_params(config), random_batch(config, 4)[0], jax.random.split(jax.random.key(0), 4)
    ours, plain = (jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile() for loss in losses)
    assert ours.cost_analysis()["flops"] == plain.cost_analysis()["flops"]
    jax.tree.map(np.testing.assert_array_equal, ours(*arguments), plain(*arguments))
    assert ours.cost_analysis()["flops"] > 1e5 and np.isfinite(ours(*arguments)[0])
