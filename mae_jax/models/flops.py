"""Floating-point operations of the models: 2 for each multiply-add of their matrix products.

As usual, element-wise operations (norms, softmax, GELU) are not counted; they are about half a percent. Nor are
principal-component targets and the uniformity regulariser, which are less.
"""

from mae_jax.models.classifier import ClassifierConfig
from mae_jax.models.config import MAEConfig


def block_flops(tokens: int, width: int, mlp_width: int) -> int:
    """One block's forward pass for one image: qkv, logits, weighted sum, output projection, and the two MLP layers."""
    projections = 2 * tokens * width * (3 * width + width)
    attention = 2 * 2 * tokens * tokens * width
    return projections + attention + mlp_flops(tokens, width, mlp_width)


def cross_block_flops(tokens: int, width: int, mlp_width: int, memory: int, memory_width: int) -> int:
    """As `block_flops`, for a block whose tokens attend to `memory` tokens of width `memory_width`."""
    projections = 2 * tokens * width * 2 * width + 2 * memory * memory_width * 2 * width
    attention = 2 * 2 * tokens * memory * width
    return projections + attention + mlp_flops(tokens, width, mlp_width)


def mlp_flops(tokens: int, width: int, mlp_width: int) -> int:
    return 2 * tokens * width * 2 * mlp_width


def encoder_tokens(config: MAEConfig) -> int:
    """Tokens in the encoder: class tokens, registers, and visible patches."""
    patches = config.num_patches if config.encoder_mask_tokens else config.num_visible()
    return config.class_tokens + config.registers + patches


def decoder_tokens(config: MAEConfig) -> int:
    """Tokens in the decoder: class tokens and all patches, or with cross-attention the predicted patches."""
    if config.decoder_attention == "cross":
        return config.num_predicted()
    return config.class_tokens + config.num_patches


def forward_flops(config: MAEConfig) -> int:
    """One image's forward pass through the autoencoder in training, with all of its masks."""
    width, decoder_width, mlp_width = config.width, config.decoder_width, config.decoder_blocks.mlp_width
    seen, tokens = encoder_tokens(config), decoder_tokens(config)
    encoded = seen - config.registers
    encoder = config.depth * block_flops(seen, width, config.blocks.mlp_width)
    if config.decoder_attention == "cross":
        decoder = config.decoder_depth * cross_block_flops(tokens, decoder_width, mlp_width, encoded, width)
        predicted = tokens
    else:
        decoder_embed = 2 * encoded * width * decoder_width
        decoder = decoder_embed + config.decoder_depth * block_flops(tokens, decoder_width, mlp_width)
        predicted = config.num_patches
    predict = 2 * predicted * decoder_width * config.target_dim
    return _patch_embed_flops(config, _embedded_patches(config)) + config.masks_per_image * (
        encoder + decoder + predict
    )


def train_flops(config: MAEConfig) -> int:
    """One image's forward and backward pass: 3 x forward, less the gradient of the pixels."""
    return 3 * forward_flops(config) - _patch_embed_flops(config, _embedded_patches(config))


def _embedded_patches(config: MAEConfig) -> int:
    if config.encoder_mask_tokens or config.masks_per_image > 1:
        return config.num_patches
    return config.num_visible()


def represent_flops(config: ClassifierConfig) -> int:
    """One image's forward pass through the classifier's encoder."""
    encoder = config.encoder
    blocks = encoder.depth * block_flops(_all_tokens(encoder), encoder.width, encoder.blocks.mlp_width)
    return _patch_embed_flops(encoder, encoder.num_patches) + blocks


def classify_flops(config: ClassifierConfig) -> int:
    """One representation's forward pass through the classifier's head."""
    encoder = config.encoder
    pool = 2 * encoder.num_patches * encoder.width * (2 * encoder.width + 2) if config.pool == "attentive" else 0
    return pool + 2 * encoder.width * config.num_classes


def classify_train_flops(config: ClassifierConfig) -> int:
    """As `classify_flops`, plus the backward pass; into the representation only if something below it trains."""
    if config.trained_blocks != 0 or config.pool == "mean_norm":
        return 3 * classify_flops(config)
    width, attentive = config.encoder.width, config.pool == "attentive"
    from_input = 2 * config.encoder.num_patches * width * 2 * width if attentive else 2 * width * config.num_classes
    return 3 * classify_flops(config) - from_input


def classifier_train_flops(config: ClassifierConfig) -> int:
    """One image's forward pass and the backward pass of what trains: 2 x forward, less one gradient.

    That is the gradient of the first trained layer's input, below which nothing trains (a norm's scale and bias are
    folded into the layer's kernel). With two or more blocks XLA computes it anyway, since all blocks are one loop.
    """
    encoder, tokens = config.encoder, _all_tokens(config.encoder)
    width, mlp_width = encoder.width, encoder.blocks.mlp_width
    if config.trained_blocks is None:
        trained = 2 * represent_flops(config) - _patch_embed_flops(encoder, encoder.num_patches)
    elif config.trained_blocks == 0:
        trained = 0
    elif config.trained_blocks == 0.5:
        trained = 2 * mlp_flops(tokens, width, mlp_width) - 2 * tokens * width * mlp_width
    else:
        blocks = int(config.trained_blocks) * block_flops(tokens, width, mlp_width)
        trained = 2 * blocks - 2 * tokens * width * 3 * width
    return represent_flops(config) + trained + classify_train_flops(config)


def _all_tokens(config: MAEConfig) -> int:
    return config.class_tokens + config.registers + config.num_patches


def _patch_embed_flops(config: MAEConfig, patches: int) -> int:
    return 2 * patches * config.patch_dim * config.width
