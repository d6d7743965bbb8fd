"""What the model is measured against: plain NumPy in float64, and Hugging Face's ViTMAEForPreTraining (PyTorch).

The NumPy side is written with loops, from reference facts and not from the library, so that the two share no mistake.
"""

import math
import types

import jax
import numpy as np

from mae_jax.models.mae import MAEConfig, init_params
from mae_jax.models.masking import Mask, draw_masks

# ---------------------------------------------------------------------------------------------------------- weights


def random_params(config: MAEConfig, seed: int = 0) -> dict:
    """Random values for every parameter of the autoencoder."""
    return random_like(jax.eval_shape(lambda: init_params(config, jax.random.key(0))), seed)


def random_like(shapes: dict, seed: int = 0) -> dict:
    """Random values for parameters, biases and norms too, so that no term of a model hides behind a zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, normal = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            return normal / np.float32(math.sqrt(leaf.shape[-3 if path[-2].key in ("qkv", "kv") else -2]))
        return normal * np.float32(0.2) + np.float32(name == "scale")

    return jax.tree_util.tree_map_with_path(draw, shapes)


def drawn_masks(keys: jax.Array, grid: tuple[int, int], ratio: float, sampling: str = "random", cell: int = 1) -> Mask:
    """Masks of keys [B] as `model.mask_sampling` and `model.mask_cell` draw them, without patches to look at."""
    return draw_masks(keys, None, grid, ratio, types.SimpleNamespace(mask_sampling=sampling, mask_cell=cell))


def random_batch(config: MAEConfig, batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images [B, H, W, C] and mask noise [B, L]."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((batch, *config.image_size, config.channels)).astype(np.float32)
    return images, rng.random((batch, config.num_patches)).astype(np.float32)


def max_relative(found, expected) -> float:
    """Largest deviation, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def leaves_by_block(params: dict) -> dict[str, np.ndarray]:
    """Every parameter by name, stacked blocks taken apart: {"encoder/blocks/0/mlp/fc1/kernel": [in, out], ...}."""
    leaves = {}
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        if "blocks" in names:
            for depth, part in enumerate(np.asarray(value)):
                leaves["/".join([*names[:2], str(depth), *names[2:]])] = part
        else:
            leaves["/".join(names)] = np.asarray(value)
    return leaves


# ------------------------------------------------------------------------------------------------------------ NumPy


def loop_positions(rows: int, columns: int, width: int) -> np.ndarray:
    """The position table [1 + rows * columns, width], value by value in float64."""
    table = [[0.0] * width]
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            sines_and_cosines = []
            for position in (column, row):
                for function in (math.sin, math.cos):
                    for k in range(quarter):
                        sines_and_cosines.append(function(position / math.pow(10000, k / quarter)))
            table.append(sines_and_cosines)
    return np.array(table)


def loop_patches(images: np.ndarray, p: int) -> np.ndarray:
    """Patches [B, L, p*p*C], value by value."""
    b, height, width, channels = images.shape
    columns = width // p
    patches = np.empty((b, (height // p) * columns, p * p * channels), images.dtype)
    for y in range(height):
        for x in range(width):
            for channel in range(channels):
                place = ((y % p) * p + x % p) * channels + channel
                patches[:, (y // p) * columns + x // p, place] = images[:, y, x, channel]
    return patches


def numpy_gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x) * 0.5 * (1 + np.vectorize(math.erf)(np.asarray(x) / math.sqrt(2)))


def _norm(x, p, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def _linear(x, p):
    return x @ p["kernel"] + p["bias"]


def _blocks(x, stacked, heads, epsilon):
    """Tokens x [N, D] of one image through all blocks."""
    for depth in range(len(stacked["norm1"]["scale"])):
        p = jax.tree.map(lambda leaf, depth=depth: leaf[depth], stacked)
        qkv = p["attention"]["qkv"]
        q, k, v = (_norm(x, p["norm1"], epsilon) @ qkv["kernel"][:, part] + qkv["bias"][part] for part in range(3))
        outputs = []
        for head in range(heads):
            part = slice(head * x.shape[1] // heads, (head + 1) * x.shape[1] // heads)
            logits = q[:, part] @ k[:, part].T / math.sqrt(x.shape[1] // heads)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
        x = x + _linear(np.concatenate(outputs, axis=-1), p["attention"]["out"])
        hidden = numpy_gelu(_linear(_norm(x, p["norm2"], epsilon), p["mlp"]["fc1"]))
        x = x + _linear(hidden, p["mlp"]["fc2"])
    return x


def _encode(p, config, patches, kept):
    rows, columns = config.grid
    x = _linear(patches, p["patch_embed"]) + loop_positions(rows, columns, config.width)[1:]
    x = np.concatenate([p["class_token"][0], x[kept]])
    return _norm(_blocks(x, p["blocks"], config.num_heads, config.norm_epsilon), p["norm"], config.norm_epsilon)


def numpy_encode(params: dict, config: MAEConfig, images: np.ndarray) -> np.ndarray:
    """Features [B, 1 + L, D] with nothing hidden, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    patches = loop_patches(images.astype(np.float64), config.patch_size)
    return np.stack([_encode(params["encoder"], config, x, np.arange(len(x))) for x in patches])


def numpy_mae(params: dict, config: MAEConfig, images: np.ndarray, noise: np.ndarray):
    """Loss and predictions [B, L, p*p*C] of the autoencoder, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows, columns = config.grid
    encoder, decoder = params["encoder"], params["decoder"]
    predictions, losses = [], []
    for patches, values in zip(loop_patches(images.astype(np.float64), config.patch_size), noise, strict=True):
        kept = np.argsort(values, kind="stable")[: int(len(values) * (1 - config.mask_ratio))]
        encoded = _linear(_encode(encoder, config, patches, kept), decoder["embed"])
        x = np.repeat(decoder["mask_token"][0], len(values), axis=0)
        x[kept] = encoded[1:]
        x = np.concatenate([encoded[:1], x]) + loop_positions(rows, columns, config.decoder_width)
        x = _blocks(x, decoder["blocks"], config.decoder_num_heads, config.norm_epsilon)
        prediction = _linear(_norm(x, decoder["norm"], config.norm_epsilon), decoder["predict"])[1:]
        target = patches
        if config.normalize_targets:
            target = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(patches.var(-1, ddof=1)[:, None] + 1e-6)
        hidden = np.setdiff1d(np.arange(len(values)), kept)
        losses.append(((prediction - target) ** 2)[hidden].mean())
        predictions.append(prediction)
    return np.mean(losses), np.stack(predictions)


# ----------------------------------------------------------------------------------------------------- Hugging Face


def to_hf_state(params: dict, config: MAEConfig) -> dict[str, np.ndarray]:
    """Parameters (or gradients) by the names of transformers 5, without the position tables."""
    leaves, p, state = leaves_by_block(params), config.patch_size, {}
    for name, value in leaves.items():
        names = name.split("/")
        if name in ("encoder/class_token", "decoder/mask_token"):
            state[{"encoder": "vit.embeddings.cls_token", "decoder": "decoder.mask_token"}[names[0]]] = value
            continue
        if names[-2] == "qkv":  # queries, keys and values side by side
            value = value.reshape(*value.shape[:-2], -1)
        value = value.T if names[-1] == "kernel" else value
        end = "bias" if names[-1] == "bias" else "weight"
        if name == "encoder/patch_embed/kernel":  # [D, (row, column, channel)] -> [D, channel, row, column]
            value = value.reshape(-1, p, p, config.channels).transpose(0, 3, 1, 2)
        if names[-2] == "qkv":
            for letter, part in zip("qkv", np.split(value, 3), strict=True):
                state[f"{_hf_module(names)}.{letter}_proj.{end}"] = part
        else:
            state[f"{_hf_module(names)}.{end}"] = value
    return {name: np.ascontiguousarray(value) for name, value in state.items()}


def from_hf_state(state: dict[str, np.ndarray], config: MAEConfig) -> dict[str, np.ndarray]:
    """Inverts `to_hf_state`: by name, blocks taken apart, as `leaves_by_block` gives them."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    leaves = {}
    for name, shape in leaves_by_block(jax.tree.map(lambda s: np.empty(s.shape, bool), shapes)).items():
        names = name.split("/")
        if name in ("encoder/class_token", "decoder/mask_token"):
            leaves[name] = state["vit.embeddings.cls_token" if names[0] == "encoder" else "decoder.mask_token"]
            continue
        end = "bias" if names[-1] == "bias" else "weight"
        if names[-2] == "qkv":
            value = np.concatenate([state[f"{_hf_module(names)}.{letter}_proj.{end}"] for letter in "qkv"])
        else:
            value = state[f"{_hf_module(names)}.{end}"]
        if name == "encoder/patch_embed/kernel":
            value = value.transpose(0, 2, 3, 1).reshape(config.width, config.patch_dim)
        leaves[name] = value.T if names[-1] == "kernel" else value
        if names[-2] == "qkv":
            leaves[name] = leaves[name].reshape(shape.shape)
        assert leaves[name].shape == shape.shape, name
    return leaves


def _hf_module(names: list[str]) -> str:
    if names[1] == "blocks":
        inner = {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp": f"mlp.{names[4]}"}.get(names[3])
        if names[3] == "attention":
            inner = "attention" if names[4] == "qkv" else "attention.o_proj"
        return f"{'vit.layers' if names[0] == 'encoder' else 'decoder.decoder_layers'}.{names[2]}.{inner}"
    return {
        "encoder/patch_embed": "vit.embeddings.patch_embeddings.projection",
        "encoder/norm": "vit.layernorm",
        "decoder/embed": "decoder.decoder_embed",
        "decoder/norm": "decoder.decoder_norm",
        "decoder/predict": "decoder.decoder_pred",
    }["/".join(names[:2])]


def create_hf_model(params: dict, config: MAEConfig, tables: tuple[np.ndarray, np.ndarray]):
    """ViTMAEForPreTraining with our parameters, and these tables of encoder and decoder in place of its zeros."""
    import torch
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    hf_config = ViTMAEConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        intermediate_size=int(config.mlp_ratio * config.width),
        layer_norm_eps=config.norm_epsilon,
        image_size=config.image_size[0],
        patch_size=config.patch_size,
        num_channels=config.channels,
        decoder_num_attention_heads=config.decoder_num_heads,
        decoder_hidden_size=config.decoder_width,
        decoder_num_hidden_layers=config.decoder_depth,
        decoder_intermediate_size=int(config.mlp_ratio * config.decoder_width),
        mask_ratio=config.mask_ratio,
        norm_pix_loss=config.normalize_targets,
        attn_implementation="eager",
    )
    with torch.device("meta"):  # no time for initial values that are replaced anyway
        model = ViTMAEForPreTraining(hf_config)
    state = to_hf_state(params, config)
    state["vit.embeddings.position_embeddings"], state["decoder.decoder_pos_embed"] = (table[None] for table in tables)
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=True, assign=True)
    return model
