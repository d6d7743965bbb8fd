"""The settings that define a model, and the named sizes."""

import dataclasses

from mae_jax.errors import UserError
from mae_jax.models.masking import MASK_SAMPLINGS, num_visible
from mae_jax.models.patches import grid_size
from mae_jax.models.transformer import ACTIVATIONS, ATTENTION_BACKENDS, BlockConfig

# The named encoders. tiny, small: DeiT (arXiv 2012.12877); base, large, huge: ViT (arXiv 2010.11929), as in the paper.
SIZES = {
    "tiny": dict(width=192, depth=12, num_heads=3, patch_size=16),
    "small": dict(width=384, depth=12, num_heads=6, patch_size=16),
    "base": dict(width=768, depth=12, num_heads=12, patch_size=16),
    "large": dict(width=1024, depth=24, num_heads=16, patch_size=16),
    "huge": dict(width=1280, depth=32, num_heads=16, patch_size=14),
}

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "activation": tuple(ACTIVATIONS),
    "positions": ("sincos", "learned"),
    "attention": ATTENTION_BACKENDS,
    "mask_sampling": MASK_SAMPLINGS,
    "loss_patches": ("hidden", "all"),
    "decoder_attention": ("self", "cross"),
}


@dataclasses.dataclass(frozen=True)
class MAEConfig:
    """Everything that defines the model; the settings `model.*` of configs/common.py, with the same meaning.

    Raises:
      UserError: if the values do not make a model.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16
    mask_ratio: float = 0.75
    normalize_targets: bool = True
    norm_epsilon: float = 1e-6
    dtype: str = "float32"
    remat: bool = False
    scan_unroll: int = 1
    mlp_width: int | None = None  # None: mlp_ratio * width
    decoder_mlp_width: int | None = None  # None: mlp_ratio * decoder_width
    activation: str = "gelu"
    qkv_bias: bool = True
    positions: str = "sincos"
    attention: str = "xla"
    mask_sampling: str = "random"
    mask_cell: int = 1
    encoder_mask_tokens: bool = False
    loss_patches: str = "hidden"
    pca_targets: int | None = None
    class_tokens: int = 1
    registers: int = 0
    qk_norm: bool = False
    decoder_attention: str = "self"
    prediction_ratio: float | None = None
    masks_per_image: int = 1
    uniformity: float = 0.0

    def __post_init__(self):
        size = self.image_size
        size = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
        if len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise UserError(f"model.image_size={self.image_size!r} is neither an integer nor (height, width)")
        object.__setattr__(self, "image_size", size)
        for name in ("channels", "width", "depth", "num_heads", "decoder_width", "decoder_depth", "decoder_num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least 1")
        for name, scale in (("width", "num_heads"), ("decoder_width", "decoder_num_heads")):
            width, heads = getattr(self, name), getattr(self, scale)
            if width % heads:
                raise UserError(f"model.{scale}={heads} does not divide model.{name}={width}; change one of them")
            if width % 4:
                raise UserError(f"model.{name}={width} must be a multiple of 4 (2-D sine-cosine positions)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"model.{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise UserError("model.attention=cudnn works in half precision: set model.dtype=bfloat16 too")
        if not self.norm_epsilon > 0:
            raise UserError(f"model.norm_epsilon={self.norm_epsilon} must be above 0")
        for name, blocks in (("mlp_width", self.blocks), ("decoder_mlp_width", self.decoder_blocks)):
            if blocks.mlp_width < 1:
                own = getattr(self, name)
                text = f"mlp_ratio={self.mlp_ratio} leaves" if own is None else f"{name}={own} leaves"
                raise UserError(f"model.{text} the MLPs no hidden unit")
        if self.scan_unroll < 1:
            raise UserError(f"model.scan_unroll={self.scan_unroll} must be at least 1")
        if self.normalize_targets and self.patch_dim == 1:
            raise UserError(
                "model.normalize_targets needs patches of more than one value (one value has no variance); "
                "set model.normalize_targets=False or a larger model.patch_size"
            )
        check_mask_ratio(self.mask_ratio, self.num_patches, "model.mask_ratio")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_size(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def blocks(self) -> BlockConfig:
        """Of the encoder."""
        return self._blocks(self.width, self.num_heads, self.mlp_width)

    @property
    def decoder_blocks(self) -> BlockConfig:
        return self._blocks(self.decoder_width, self.decoder_num_heads, self.decoder_mlp_width)

    def _blocks(self, width: int, num_heads: int, mlp_width: int | None) -> BlockConfig:
        return BlockConfig(
            width, num_heads, int(self.mlp_ratio * width) if mlp_width is None else mlp_width,
            self.norm_epsilon, self.activation, self.qkv_bias, self.attention, self.dtype,
        )  # fmt: skip

    @property
    def patch_dim(self) -> int:
        """Values in a patch: p * p * C."""
        return self.patch_size**2 * self.channels


def check_mask_ratio(mask_ratio: float, num_patches: int, name: str = "mask_ratio") -> None:
    """Raises UserError unless 0 <= mask_ratio < 1 and at least one of the patches stays visible."""
    if not 0 <= mask_ratio < 1:
        raise UserError(f"{name}={mask_ratio} is outside [0, 1)")
    if num_visible(num_patches, mask_ratio) < 1:
        raise UserError(f"{name}={mask_ratio} leaves none of {num_patches} patches visible; lower it")
