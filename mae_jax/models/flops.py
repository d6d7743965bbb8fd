"""FLOPs of the models: 2 for each multiply-add of matrix products; all else is less than a percent."""

from mae_jax.models.classifier import ClassifierConfig
from mae_jax.models.config import MAEConfig

POOL_KERNELS = {"attentive": 2, "abmilp": 1}  # kernels [D, D] that a learned pool applies to each patch token


def block_flops(
    tokens: int, width: int, mlp_width: int, memory: int | None = None, memory_width: int | None = None
) -> int:
    """One block's forward pass for one image; `memory`: the tokens that its own attend to, if not themselves."""
    memory, memory_width = memory or tokens, memory_width or width
    queries_and_output, keys_and_values = 2 * tokens * width * 2 * width, 2 * memory * memory_width * 2 * width
    attention = 2 * 2 * tokens * memory * width
    return queries_and_output + keys_and_values + attention + 2 * tokens * width * 2 * mlp_width


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
    width, decoder_width, cross = config.width, config.decoder_width, config.decoder_attention == "cross"
    seen, tokens = encoder_tokens(config), decoder_tokens(config)
    encoded = seen - config.registers
    encoder = config.depth * block_flops(seen, width, config.blocks.mlp_width)
    memory = (encoded, width) if cross else ()
    decoder = config.decoder_depth * block_flops(tokens, decoder_width, config.decoder_blocks.mlp_width, *memory)
    embed = 0 if cross else 2 * encoded * width * decoder_width
    predict = 2 * (tokens if cross else config.num_patches) * decoder_width * config.target_dim
    return _embed_flops(config) + config.masks_per_image * (encoder + embed + decoder + predict)


def train_flops(config: MAEConfig) -> int:
    """One image's forward and backward pass: 3 x forward, less the gradient of the pixels."""
    return 3 * forward_flops(config) - _embed_flops(config)


def _embed_flops(config: MAEConfig) -> int:
    embeds_all = config.encoder_mask_tokens or config.masks_per_image > 1
    return 2 * (config.num_patches if embeds_all else config.num_visible()) * config.patch_dim * config.width


def represent_flops(config: ClassifierConfig) -> int:
    """One image's forward pass through the classifier's encoder."""
    _, patch_embed, block = _encoder_flops(config.encoder)
    return patch_embed + config.encoder.depth * block


def _encoder_flops(encoder: MAEConfig) -> tuple[int, int, int]:
    """The tokens of an encoder without masks; the FLOPs of its patch embedding, and of a block."""
    tokens = encoder.class_tokens + encoder.registers + encoder.num_patches
    patch_embed = 2 * encoder.num_patches * encoder.patch_dim * encoder.width
    return tokens, patch_embed, block_flops(tokens, encoder.width, encoder.blocks.mlp_width)


def classify_flops(config: ClassifierConfig) -> int:
    """One representation's forward pass through the classifier's head."""
    encoder = config.encoder
    kernels = POOL_KERNELS.get(config.pool, 0)
    pool = 2 * encoder.num_patches * encoder.width * (kernels * encoder.width + 2) if kernels else 0
    return pool + 2 * encoder.width * config.num_classes


def classify_train_flops(config: ClassifierConfig) -> int:
    """As `classify_flops`, plus the backward pass; into the representation only if something below it trains."""
    if config.trained_blocks != 0 or config.pool == "mean_norm":
        return 3 * classify_flops(config)
    width, kernels = config.encoder.width, POOL_KERNELS.get(config.pool, 0)
    of_pool = 2 * config.encoder.num_patches * width * kernels * width
    return 3 * classify_flops(config) - (of_pool or 2 * width * config.num_classes)


def classifier_train_flops(config: ClassifierConfig) -> int:
    """One image's forward pass, and the backward pass of what trains, without the first input's gradient."""
    encoder = config.encoder
    tokens, patch_embed, block = _encoder_flops(encoder)
    match config.trained_blocks:
        case None:
            trained = 2 * represent_flops(config) - patch_embed
        case 0:
            trained = 0
        case 0.5:
            trained = 3 * 2 * tokens * encoder.width * encoder.blocks.mlp_width
        case blocks:
            trained = 2 * int(blocks) * block - 2 * tokens * encoder.width * 3 * encoder.width
    return represent_flops(config) + trained + classify_train_flops(config)
