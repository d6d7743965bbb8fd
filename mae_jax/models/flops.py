"""Floating-point operations of the models: 2 for each multiply-add of their matrix products.

The autoencoder's encoder works on the visible patches and the class token, its decoder on all patches and the class
token; the classifier's encoder works on all patches. Element-wise work (norms, softmax, GELU) is not counted, as usual;
it is about half a percent.
"""

from mae_jax.models.classifier import ClassifierConfig
from mae_jax.models.mae_config import MAEConfig
from mae_jax.models.masking import num_visible


def block_flops(tokens: int, width: int, mlp_width: int) -> int:
    """One block's forward pass for one image: qkv, logits, weighted sum, output projection, and the two MLP layers."""
    projections = 2 * tokens * width * (3 * width + width)
    attention = 2 * 2 * tokens * tokens * width
    return projections + attention + mlp_flops(tokens, width, mlp_width)


def mlp_flops(tokens: int, width: int, mlp_width: int) -> int:
    """One MLP's forward pass for one image."""
    return 2 * tokens * width * 2 * mlp_width


def forward_flops(config: MAEConfig) -> int:
    """One image's pass through the autoencoder: encoder, decoder and prediction."""
    visible, patches = num_visible(config.num_patches, config.mask_ratio), config.num_patches
    width, decoder_width = config.width, config.decoder_width
    encoder = config.depth * block_flops(1 + visible, width, config.blocks.mlp_width)
    decoder = config.decoder_depth * block_flops(1 + patches, decoder_width, config.decoder_blocks.mlp_width)
    decoder_embed = 2 * (1 + visible) * width * decoder_width
    predict = 2 * patches * decoder_width * config.patch_dim
    return _patch_embed_flops(config, visible) + encoder + decoder_embed + decoder + predict


def train_flops(config: MAEConfig) -> int:
    """One image's forward and backward pass: 3 x forward, without the gradient of the pixels, which nobody needs."""
    visible = num_visible(config.num_patches, config.mask_ratio)
    return 3 * forward_flops(config) - _patch_embed_flops(config, visible)


def represent_flops(config: ClassifierConfig) -> int:
    """One image's pass through the classifier's encoder."""
    encoder = config.encoder
    blocks = encoder.depth * block_flops(1 + encoder.num_patches, encoder.width, encoder.blocks.mlp_width)
    return _patch_embed_flops(encoder, encoder.num_patches) + blocks


def classify_flops(config: ClassifierConfig) -> int:
    """One representation's pass through the classifier's head."""
    encoder = config.encoder
    pool = 2 * encoder.num_patches * encoder.width * (2 * encoder.width + 2) if config.pool == "attentive" else 0
    return pool + 2 * encoder.width * config.num_classes


def classify_train_flops(config: ClassifierConfig) -> int:
    """One representation's pass through the head and back, to the representation itself only if that can learn."""
    if config.trained_blocks != 0 or config.pool == "mean_norm":
        return 3 * classify_flops(config)
    width, attentive = config.encoder.width, config.pool == "attentive"
    from_input = 2 * config.encoder.num_patches * width * 2 * width if attentive else 2 * width * config.num_classes
    return 3 * classify_flops(config) - from_input


def classifier_train_flops(config: ClassifierConfig) -> int:
    """One image's forward pass, and the backward pass (2 x forward) of that which trains."""
    encoder, tokens = config.encoder, 1 + config.encoder.num_patches
    if config.trained_blocks is None:
        trained = 2 * represent_flops(config) - _patch_embed_flops(encoder, encoder.num_patches)
    elif config.trained_blocks == 0.5:
        trained = 2 * mlp_flops(tokens, encoder.width, encoder.blocks.mlp_width)
    else:
        trained = 2 * int(config.trained_blocks) * block_flops(tokens, encoder.width, encoder.blocks.mlp_width)
    return represent_flops(config) + trained + classify_train_flops(config)


def _patch_embed_flops(config: MAEConfig, patches: int) -> int:
    return 2 * patches * config.patch_dim * config.width
