"""A control for `benchmarks.chip_cost`: an MAE pre-training step in plain JAX, as short as it can be written.

Activations are bfloat16 throughout, parameters and AdamW float32, blocks unrolled (or scanned). On GPUs attention is
the public Pallas kernel of jax.experimental, on TPUs products and softmax. No accumulation, no options of the library.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mae_jax.models.config import SIZES, MAEConfig
from mae_jax.runtime.mesh import lowering_for

BLOCK = 64  # tokens that the Pallas kernel takes at a time; sequences are padded to whole blocks


def dense(x, p):
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def norm(x, p):
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-6)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def xla_attention(q, k, v):
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(logits.astype(jnp.float32)).astype(q.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def pallas_attention(q, k, v):
    from jax.experimental.pallas.ops.gpu import attention

    (b, n), d, sides = q.shape[:2], q.shape[-1], ("q", "k", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    pad = [(0, 0), (0, -n % BLOCK), (0, 0), (0, 0)]
    real = jnp.broadcast_to((jnp.arange(n + -n % BLOCK) < n).astype(jnp.int32), (b, n + -n % BLOCK))
    sizes = attention.BlockSizes(**{f"block_{side}": BLOCK for side in sides})
    padded = (jnp.pad(x, pad) for x in (q, k, v))
    return attention.mha(*padded, segment_ids=real, sm_scale=d**-0.5, block_sizes=sizes)[:, :n]


def block(x, p, heads, attend):
    b, n, d = x.shape
    q, k, v = jnp.split(dense(norm(x, p["norm1"]), p["qkv"]).reshape(b, n, 3 * heads, d // heads), 3, axis=2)
    x = x + dense(attend(q, k, v).reshape(b, n, d), p["out"])
    return x + dense(jax.nn.gelu(dense(norm(x, p["norm2"]), p["fc1"]), approximate=False), p["fc2"])


def blocks(x, stack, heads, attend, scan):
    step = functools.partial(block, heads=heads, attend=attend)
    if scan:
        return jax.lax.scan(lambda x, p: (step(x, p), None), x, stack)[0]
    for index in range(len(stack["norm1"]["scale"])):
        x = step(x, jax.tree.map(lambda leaf, index=index: leaf[index], stack))
    return x


def make_loss(config: MAEConfig, attend, scan: bool):
    (rows, columns), patch, count = config.grid, config.patch_size, config.num_visible()

    def loss_fn(params, images, key):
        b = len(images)
        x = (images.astype(jnp.float32) / 127.5 - 1).reshape(b, rows, patch, columns, patch, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows * columns, -1)
        order = jnp.argsort(jax.random.uniform(key, x.shape[:2]), axis=1)
        restore = jnp.argsort(order, axis=1)[:, :, None]
        tokens = dense(x.astype(jnp.bfloat16), params["embed"]) + params["positions"].astype(jnp.bfloat16)
        tokens = jnp.take_along_axis(tokens, order[:, :count, None], axis=1)
        tokens = jnp.concatenate([jnp.broadcast_to(params["class"], (b, 1, config.width)).astype(x.dtype), tokens], 1)
        tokens = blocks(tokens.astype(jnp.bfloat16), params["encoder"], config.num_heads, attend, scan)
        tokens = dense(norm(tokens, params["norm"]), params["decoder_embed"])
        hidden = params["mask"].astype(tokens.dtype)
        hidden = jnp.broadcast_to(hidden, (b, rows * columns - count, config.decoder_width))
        patches = jnp.take_along_axis(jnp.concatenate([tokens[:, 1:], hidden], axis=1), restore, axis=1)
        tokens = jnp.concatenate([tokens[:, :1], patches + params["decoder_positions"].astype(tokens.dtype)], axis=1)
        tokens = blocks(tokens, params["decoder"], config.decoder_num_heads, attend, scan)
        prediction = dense(norm(tokens[:, 1:], params["decoder_norm"]), params["predict"]).astype(jnp.float32)
        target = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
        is_hidden = restore[:, :, 0] >= count
        return jnp.sum(jnp.mean((prediction - target) ** 2, axis=-1) * is_hidden) / jnp.sum(is_hidden)

    return loss_fn


def abstract_params(config: MAEConfig) -> dict[str, Any]:
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def layer(inputs, outputs, *depth):
        return {"kernel": array(*depth, inputs, outputs), "bias": array(*depth, outputs)}

    def scales(width, *depth):
        return {"scale": array(*depth, width), "bias": array(*depth, width)}

    def stack(width, depth):
        found = {"norm1": scales(width, depth), "norm2": scales(width, depth), "qkv": layer(width, 3 * width, depth)}
        found |= {"out": layer(width, width, depth), "fc1": layer(width, 4 * width, depth)}
        return found | {"fc2": layer(4 * width, width, depth)}

    width, narrow, dim = config.width, config.decoder_width, config.patch_dim
    return {
        "embed": layer(dim, width), "positions": array(config.num_patches, width), "class": array(1, 1, width),
        "encoder": stack(width, config.depth), "norm": scales(width), "decoder_embed": layer(width, narrow),
        "mask": array(1, 1, narrow), "decoder_positions": array(config.num_patches, narrow),
        "decoder": stack(narrow, config.decoder_depth), "decoder_norm": scales(narrow), "predict": layer(narrow, dim),
    }  # fmt: skip


def compile_plain(
    size: str, devices: list[jax.Device], batch: int, options: dict | None, scan: bool = False
) -> jax.stages.Compiled:
    """The step of a named size of ViT (models.config.SIZES), `batch` images on each of some devices."""
    on_gpu, mesh = devices[0].platform == "gpu", Mesh(np.asarray(devices), "data")
    loss_fn = make_loss(MAEConfig(**SIZES[size]), pallas_attention if on_gpu else xla_attention, scan)
    optimizer = optax.adamw(1e-4, b1=0.9, b2=0.95, weight_decay=0.05)

    def step(params, moments, images, key):
        loss, gradients = jax.value_and_grad(loss_fn)(params, images, key)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, loss

    params = abstract_params(MAEConfig(**SIZES[size]))
    images = jax.ShapeDtypeStruct((batch * len(devices), 224, 224, 3), jnp.uint8)
    key = jax.eval_shape(lambda: jax.random.key(0))
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    compiled = jax.jit(step, in_shardings=(whole, whole, rows, whole), out_shardings=whole, donate_argnums=(0, 1))
    with lowering_for(mesh):
        return compiled.lower(params, jax.eval_shape(optimizer.init, params), images, key).compile(options)
