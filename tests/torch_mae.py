"""The autoencoder with its options in PyTorch and float64, one mask after the other, from the papers' definitions."""

import jax
import numpy as np
import torch
from torch.nn import functional

from mae_jax.models.mae import MAEConfig
from tests.reference import loop_patches, loop_positions


def to_torch(params: dict) -> dict:
    """Parameters as leaves of PyTorch's graph, float64."""
    return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf, np.float64), requires_grad=True), params)


def _norm(x, p, epsilon):
    return functional.layer_norm(x, x.shape[-1:], p["scale"], p.get("bias"), epsilon)


def _linear(x, p):
    return functional.linear(x, p["kernel"].T, p["bias"])


def _split_linear(x, p, part):
    return x @ p["kernel"][:, part] + p["bias"][part]


def _blocks(x, stacked, heads, epsilon, memory=None):
    """Tokens x [N, D] through all blocks; they attend to the tokens of `memory` [M, D'] if there is one."""
    for depth in range(len(stacked["norm1"]["scale"])):
        p = jax.tree.map(lambda leaf, depth=depth: leaf[depth], stacked)
        attention, y = p["attention"], _norm(x, p["norm1"], epsilon)
        if memory is None:
            q, k, v = (_split_linear(y, attention["qkv"], part) for part in range(3))
        else:
            q = _linear(y, attention["q"])
            k, v = (_split_linear(memory, attention["kv"], part) for part in range(2))
        q, k, v = (t.reshape(len(t), heads, -1).transpose(0, 1) for t in (q, k, v))
        if "q_norm" in attention:
            q, k = _norm(q, attention["q_norm"], epsilon), _norm(k, attention["k_norm"], epsilon)
        y = functional.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1).reshape(len(x), -1)
        x = x + _linear(y, attention["out"])
        x = x + _linear(functional.gelu(_linear(_norm(x, p["norm2"], epsilon), p["mlp"]["fc1"])), p["mlp"]["fc2"])
    return x


def _table(p, grid, width):
    return p["positions"] if "positions" in p else torch.tensor(loop_positions(*grid, width))


def torch_encode(params: dict, config: MAEConfig, patches: torch.Tensor, hidden: np.ndarray) -> torch.Tensor:
    """The tokens [C + K, D] of patches [L, p*p*C], or [C + L, D] if the encoder sees mask tokens."""
    p, table = params["encoder"], _table(params["encoder"], config.grid, config.width)
    x = _linear(patches, p["patch_embed"])
    if config.encoder_mask_tokens:
        x = torch.stack([params["decoder"]["mask_token"][0, 0] if h else row for row, h in zip(x, hidden, strict=True)])
    x = x + table[1:]
    if not config.encoder_mask_tokens:
        x = x[~hidden]
    first = [p["class_token"][0] + table[0], *([p["registers"][0]] if config.registers else [])]
    x = _blocks(torch.cat([*first, x]), p["blocks"], config.num_heads, config.norm_epsilon)
    x = torch.cat([x[: config.class_tokens], x[config.class_tokens + config.registers :]])
    return _norm(x, p["norm"], config.norm_epsilon)


def torch_decode(params: dict, config: MAEConfig, tokens: torch.Tensor, hidden: np.ndarray) -> torch.Tensor:
    """Predictions [L, target_dim]."""
    p, classes = params["decoder"], config.class_tokens
    table = _table(p, config.grid, config.decoder_width)
    if config.decoder_attention == "cross":
        x, memory, first = p["mask_token"][0] + table[1:], tokens, 0
    else:
        embedded, memory, first = _linear(tokens, p["embed"]), None, classes
        rows = list(embedded[classes:])
        if not config.encoder_mask_tokens:
            rows = [p["mask_token"][0, 0] if h else rows.pop(0) for h in hidden]
        x = torch.cat([embedded[:classes] + table[0], torch.stack(rows) + table[1:]])
    x = _blocks(x, p["blocks"], config.decoder_num_heads, config.norm_epsilon, memory)
    return _linear(_norm(x, p["norm"], config.norm_epsilon), p["predict"])[first:]


def torch_mae(params: dict, config: MAEConfig, images: np.ndarray, hidden: np.ndarray, predicted=None):
    """(loss, predictions [B * M, L, target_dim]) of images [B, H, W, C] and their masks [B * M, L], M of each image.

    Args:
      predicted: [B * M, P], the patches that count; None: as `config.loss_patches` says.
    """
    losses, predictions, features = [], [], []
    masks = len(hidden) // len(images)
    for number, mask in enumerate(hidden > 0):
        patches = torch.tensor(loop_patches(images[number // masks][None].astype(np.float64), config.patch_size)[0])
        tokens = torch_encode(params, config, patches, mask)
        prediction, target = torch_decode(params, config, tokens, mask), patches
        if config.pca_targets is not None:
            basis = params["decoder"]["basis"]
            target = (patches - basis["mean"]) @ basis["components"].T
        elif config.normalize_targets:
            target = (patches - patches.mean(1, True)) / torch.sqrt(patches.var(1, keepdim=True) + 1e-6)
        counted = np.ones_like(mask) if config.loss_patches == "all" else mask
        counted = np.flatnonzero(counted) if predicted is None else predicted[number]
        losses.append(((prediction - target) ** 2)[counted].mean())
        predictions.append(prediction)
        features.append(tokens[config.class_tokens :].mean(0))
    loss = torch.stack(losses).mean()
    if config.uniformity:
        loss = loss + config.uniformity * torch_uniformity(torch.stack(features).unflatten(0, (-1, masks)).mean(1))
    return loss, torch.stack(predictions)


def torch_uniformity(features: torch.Tensor) -> torch.Tensor:
    """The mean squared cosine over all ordered pairs of two different images, [B, D] -> scalar."""
    b = len(features)
    pairs = [
        functional.cosine_similarity(features[i], features[j], dim=0) ** 2 for i in range(b) for j in range(b) if i != j
    ]
    return torch.stack(pairs).mean()
