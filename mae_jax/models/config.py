"""The settings that define a model, and the named sizes."""

import dataclasses
import math
from collections.abc import Iterator

from mae_jax.models.layers import ACTIVATIONS, BlockConfig
from mae_jax.models.masking import GRID_RATIO, SAMPLERS, count_visible
from mae_jax.models.patches import grid_size
from mae_jax.models.targets import TARGETS
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.platform import PALLAS_HEADS

# Named encoders. tiny, small: DeiT (arXiv 2012.12877); base, large, huge: ViT (arXiv 2010.11929), as in the paper.
SIZES = {
    "tiny": dict(width=192, depth=12, num_heads=3, patch_size=16),
    "small": dict(width=384, depth=12, num_heads=6, patch_size=16),
    "base": dict(width=768, depth=12, num_heads=12, patch_size=16),
    "large": dict(width=1024, depth=24, num_heads=16, patch_size=16),
    "huge": dict(width=1280, depth=32, num_heads=16, patch_size=14),
}

CHOICES = {
    "dtype": ("float32", "bfloat16", None),
    "activation": tuple(ACTIVATIONS),
    "positions": ("sincos", "learned"),
    "attention": ("xla", "pallas", "cudnn", None),
    "loss_patches": ("hidden", "all"),
    "decoder_attention": ("self", "cross"),
}

# Values of mask settings that work with every image size and mask ratio.
USUAL_MASKS = {"mask_sampling": "random", "mask_cell": 1, "prediction_ratio": None}

# The least and the most; no machine runs more. Larger numbers are typos, which may end in no error at all.
LIMITS = {
    "channels": (1, 1024), "width": (1, 2**16), "depth": (1, 1024), "num_heads": (1, 2**16),
    "decoder_width": (1, 2**16), "decoder_depth": (1, 1024), "decoder_num_heads": (1, 2**16),
    "mask_cell": (1, 2**16), "class_tokens": (1, 1024), "registers": (0, 1024), "masks_per_image": (1, 1024),
    "uniformity": (0, math.inf), "scan_unroll": (1, 1024), "norm_epsilon": (1e-30, 1),
}  # fmt: skip
MOST_PATCHES, MOST_HIDDEN_UNITS = 2**18, 2**20


@dataclasses.dataclass(frozen=True)
class MAEConfig:
    """Defines the model: the settings `model.*` of configs/common.py. UserError if they are invalid."""

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
    # None: float32 and xla here. A run chooses by its chip (`mesh.fit_to_chip`, `execution.fit_step`).
    dtype: str | None = "float32"
    remat: bool | None | tuple[bool | None, bool | None] = None  # pairs: of the encoder, of the decoder
    scan_unroll: int | None | tuple[int, int] = None
    mlp_width: int | None = None  # None: mlp_ratio * width
    decoder_mlp_width: int | None = None  # None: mlp_ratio * decoder_width
    activation: str = "gelu"
    qkv_bias: bool = True
    positions: str = "sincos"
    attention: str | None = None
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
    target: str | None = None

    def __post_init__(self):
        size = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        if not isinstance(size, tuple | list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise UserError(f"model.image_size={self.image_size!r} is neither an integer nor (height, width)")
        object.__setattr__(self, "image_size", tuple(size))
        if mistake := next(self._mistakes(), None):
            raise UserError(f"model.{mistake}")

    def _mistakes(self) -> Iterator[str]:
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple) and not least <= value <= most:
                yield f"{name}={value} is outside [{least}, {most}]"
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                yield f"{name}={getattr(self, name)!r} is not one of {', '.join(map(str, choices))}"
        for name, registry in ((self.mask_sampling, SAMPLERS), (self.target_name, TARGETS)):
            if ":" not in name:  # a user's own is imported when needed: an encoder alone does not need it
                registry.find(name)
        if self.num_patches > MOST_PATCHES:
            sizes = f"image_size={self.image_size}, model.patch_size={self.patch_size}"
            yield f"{sizes}: {self.num_patches:,} patches, more than {MOST_PATCHES:,}; change one of them"
        for half in ("", "decoder_"):
            width, heads, mlp_width = (getattr(self, half + name) for name in ("width", "num_heads", "mlp_width"))
            if width % heads:
                yield f"{half}num_heads={heads} does not divide model.{half}width={width}; change one of them"
            if width % 4:
                yield f"{half}width={width} must be a multiple of 4 (2-D sine-cosine positions)"
            if not 1 <= (units := getattr(self, f"{half}blocks").mlp_width) <= MOST_HIDDEN_UNITS:
                setting = f"mlp_ratio={self.mlp_ratio}, model.{half}mlp_width={mlp_width}"
                yield f"{setting}: an MLP of {units:,} hidden units; it has 1 to {MOST_HIDDEN_UNITS:,}"
        if self.attention in ("cudnn", "pallas") and self.dtype == "float32":
            yield f"attention={self.attention} works in half precision: set model.dtype=bfloat16 too"
        if self.target_name == "normalized_pixels" and self.patch_dim == 1:
            yield "normalize_targets=True needs patches of several values: set it to False or a larger model.patch_size"
        self.num_visible(name="model.mask_ratio")

        components, named = self.pca_targets is not None, self.target_name == "principal_components"
        if components and not 1 <= self.pca_targets <= self.patch_dim:
            yield f"pca_targets={self.pca_targets} is outside [1, {self.patch_dim}], the values of a patch"
        if components != named or components and self.target is None and self.normalize_targets:
            yield (
                f"pca_targets={self.pca_targets}, model.target={self.target}, model.normalize_targets="
                f"{self.normalize_targets}: principal components need their number pca_targets, and "
                "target=principal_components or normalize_targets=False"
            )
        cross, ratio = self.decoder_attention == "cross", self.prediction_ratio
        if cross and self.encoder_mask_tokens:
            yield "decoder_attention=cross attends to visible patches alone: set model.encoder_mask_tokens=False"
        hidden, suits = self.num_patches - self.num_visible(), cross and self.loss_patches == "hidden"
        if ratio is not None and not (suits and 0 < ratio < 1 and 1 <= int(self.num_patches * ratio) <= hidden):
            yield (
                f"prediction_ratio={ratio} of {self.num_patches} patches must give at least one and at most the "
                f"{hidden} hidden ones, with model.decoder_attention=cross and model.loss_patches=hidden (or no ratio)"
            )

    def num_visible(
        self, mask_ratio: float | None = None, grid: tuple[int, int] | None = None, name: str = "mask_ratio"
    ) -> int:
        """Number of visible patches in a grid at a mask ratio (called `name`); UserError if they suit no mask."""
        mask_ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        rows, columns = grid = self.grid if grid is None else grid
        cell = f"model.mask_cell={self.mask_cell}"
        if self.mask_cell > 1 and self.mask_sampling != "random":
            raise UserError(f"{cell} is for model.mask_sampling=random, not {self.mask_sampling}")
        if rows % self.mask_cell or columns % self.mask_cell:
            raise UserError(f"{cell} does not divide the grid of {rows} x {columns} patches")
        if self.mask_sampling == "grid" and (mask_ratio != GRID_RATIO or rows % 2 or columns % 2):
            raise UserError(
                f"model.mask_sampling=grid keeps one patch of each 2 x 2: it needs {name}={GRID_RATIO}, not "
                f"{mask_ratio}, and even numbers of patches, not {rows} x {columns}"
            )
        return count_visible(grid, mask_ratio, self.mask_cell, name)

    def num_predicted(self, grid: tuple[int, int] | None = None) -> int:
        """Number of patches that a training step predicts with a cross-attention decoder."""
        rows, columns = grid = self.grid if grid is None else grid
        hidden = rows * columns - self.num_visible(grid=grid)
        if self.loss_patches == "all" or hidden == 0:
            return rows * columns
        return hidden if self.prediction_ratio is None else int(rows * columns * self.prediction_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_size(self.image_size, self.patch_size)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def blocks(self) -> BlockConfig:
        return self._blocks(self.width, self.num_heads, self.mlp_width, None, half=0)

    @property
    def decoder_blocks(self) -> BlockConfig:
        memory_width = self.width if self.decoder_attention == "cross" else None
        widths = self.decoder_width, self.decoder_num_heads, self.decoder_mlp_width, memory_width
        return self._blocks(*widths, half=1)

    def _blocks(
        self, width: int, num_heads: int, mlp_width: int | None, memory_width: int | None, half: int
    ) -> BlockConfig:
        mlp_width = int(self.mlp_ratio * width) if mlp_width is None else mlp_width
        attention = self.attention or "xla"
        if attention == "pallas" and width // num_heads not in PALLAS_HEADS:
            attention = "xla"
        remat, unroll = (x[half] if isinstance(x, tuple) else x for x in (self.remat, self.scan_unroll))
        return BlockConfig(
            width, num_heads, mlp_width, self.norm_epsilon, self.activation, self.qkv_bias, attention,
            self.dtype or "float32", self.qk_norm, memory_width, remat, unroll or 1,
        )  # fmt: skip

    @property
    def patch_dim(self) -> int:
        """Values in a patch: p * p * C."""
        return self.patch_size**2 * self.channels

    @property
    def target_name(self) -> str:
        """`target`, or the name that `pca_targets` and `normalize_targets` imply."""
        pixels = "normalized_pixels" if self.normalize_targets else "pixels"
        implied = pixels if self.pca_targets is None else "principal_components"
        return implied if self.target is None else self.target

    @property
    def target_dim(self) -> int:
        """Number of values predicted for a patch."""
        return TARGETS.find(self.target_name).dim(self)
