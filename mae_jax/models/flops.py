"""Floating-point operations of the masked autoencoder: 2 for each multiply-add of its matrix products.

The encoder works on the visible patches and the class token, the decoder on all patches and the class token.
Element-wise work (norms, softmax, GELU) is not counted, as usual; it is about half a percent.
"""

from mae_jax.models.mae import MAEConfig
from mae_jax.models.masking import num_visible


def block_flops(tokens: int, width: int, mlp_width: int) -> int:
    """One block's forward pass for one image: qkv, logits, weighted sum, output projection, and the two MLP layers."""
    projections = 2 * tokens * width * (3 * width + width + 2 * mlp_width)
    attention = 2 * 2 * tokens * tokens * width
    return projections + attention


def forward_flops(config: MAEConfig) -> int:
    """One image's pass through encoder, decoder and prediction."""
    visible, patches = num_visible(config.num_patches, config.mask_ratio), config.num_patches
    width, decoder_width = config.width, config.decoder_width
    encoder = config.depth * block_flops(1 + visible, width, config.mlp_width)
    decoder = config.decoder_depth * block_flops(1 + patches, decoder_width, config.decoder_mlp_width)
    decoder_embed = 2 * (1 + visible) * width * decoder_width
    predict = 2 * patches * decoder_width * config.patch_dim
    return _patch_embed_flops(config) + encoder + decoder_embed + decoder + predict


def train_flops(config: MAEConfig) -> int:
    """One image's forward and backward pass: 3 x forward, without the gradient of the pixels, which nobody needs."""
    return 3 * forward_flops(config) - _patch_embed_flops(config)


def _patch_embed_flops(config: MAEConfig) -> int:
    return 2 * num_visible(config.num_patches, config.mask_ratio) * config.patch_dim * config.width
