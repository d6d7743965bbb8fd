"""The settings that define a model, and the named sizes."""

import dataclasses

from jax.sharding import Mesh

from mae_jax.models.layers import ACTIVATIONS, ATTENTION_BACKENDS, BlockConfig
from mae_jax.models.masking import GRID_RATIO, SAMPLERS, check_mask_ratio
from mae_jax.models.patches import grid_size
from mae_jax.models.targets import TARGETS
from mae_jax.runtime.errors import UserError

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
    "attention": ATTENTION_BACKENDS,
    "loss_patches": ("hidden", "all"),
    "decoder_attention": ("self", "cross"),
}

# Values of mask settings that work with every image size and mask ratio.
USUAL_MASKS = {"mask_sampling": "random", "mask_cell": 1, "prediction_ratio": None}

AT_LEAST = {
    "channels": 1, "width": 1, "depth": 1, "num_heads": 1,
    "decoder_width": 1, "decoder_depth": 1, "decoder_num_heads": 1,
    "mask_cell": 1, "class_tokens": 1, "registers": 0, "masks_per_image": 1, "uniformity": 0,
}  # fmt: skip

# No machine runs more. Larger numbers are typos, which may end in a memory error or in no error at all.
AT_MOST = {
    "channels": 1024, "width": 2**16, "depth": 1024,
    "decoder_width": 2**16, "decoder_depth": 1024,
    "class_tokens": 1024, "registers": 1024, "masks_per_image": 1024,
}  # fmt: skip
MOST_PATCHES, MOST_HIDDEN_UNITS, MOST_UNROLLED = 2**18, 2**20, 1024

UNROLLED = 12  # the most blocks that `unroll_on_cpu` unrolls


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
    dtype: str | None = "float32"  # None: float32 here; a run chooses by its chip (mesh.fitting_dtype)
    remat: bool = False
    scan_unroll: int | None = None  # None: 1; `unroll_on_cpu` sets more where that is faster
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
    target: str | None = None

    def __post_init__(self):
        size = self.image_size
        size = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
        if len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise UserError(f"model.image_size={self.image_size!r} is neither an integer nor (height, width)")
        object.__setattr__(self, "image_size", size)
        for name, least in AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise UserError(f"model.{name}={getattr(self, name)} must be at least {least}")
        for name, most in AT_MOST.items():
            if not getattr(self, name) <= most:
                raise UserError(f"model.{name}={getattr(self, name)} must be at most {most:,}")
        if self.scan_unroll is not None and not 1 <= self.scan_unroll <= MOST_UNROLLED:
            raise UserError(f"model.scan_unroll={self.scan_unroll} must be from 1 to {MOST_UNROLLED:,}")
        if self.num_patches > MOST_PATCHES:
            raise UserError(
                f"model.image_size={self.image_size} with model.patch_size={self.patch_size} makes "
                f"{self.num_patches:,} patches, more than {MOST_PATCHES:,}: make the image smaller or the patch larger"
            )
        for name, scale in (("width", "num_heads"), ("decoder_width", "decoder_num_heads")):
            width, heads = getattr(self, name), getattr(self, scale)
            if width % heads:
                raise UserError(f"model.{scale}={heads} does not divide model.{name}={width}; change one of them")
            if width % 4:
                raise UserError(f"model.{name}={width} must be a multiple of 4 (2-D sine-cosine positions)")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"model.{name}={getattr(self, name)!r} is not one of {', '.join(map(str, choices))}")
        for name, registry in ((self.mask_sampling, SAMPLERS), (self.target_name, TARGETS)):
            if ":" not in name:  # a user's own is imported when needed: an encoder alone does not need it
                registry.find(name)
        if self.attention == "cudnn" and self.dtype == "float32":
            raise UserError("model.attention=cudnn works in half precision: set model.dtype=bfloat16 too")
        if not self.norm_epsilon > 0:
            raise UserError(f"model.norm_epsilon={self.norm_epsilon} must be above 0")
        for name, blocks in (("mlp_width", self.blocks), ("decoder_mlp_width", self.decoder_blocks)):
            if blocks.mlp_width < 1:
                own = getattr(self, name)
                text = f"mlp_ratio={self.mlp_ratio} leaves" if own is None else f"{name}={own} leaves"
                raise UserError(f"model.{text} the MLPs without hidden units")
            if blocks.mlp_width > MOST_HIDDEN_UNITS:
                raise UserError(
                    f"model.mlp_ratio={self.mlp_ratio}, model.{name}={getattr(self, name)}: an MLP of "
                    f"{blocks.mlp_width:,} hidden units; {MOST_HIDDEN_UNITS:,} at most"
                )
        if self.target_name == "normalized_pixels" and self.patch_dim == 1:
            raise UserError(
                "model.normalize_targets needs patches of more than one value (one value has no variance); "
                "set model.normalize_targets=False or a larger model.patch_size"
            )
        self.num_visible(name="model.mask_ratio")
        self._check_target_and_decoder()

    def _check_target_and_decoder(self) -> None:
        if self.pca_targets is not None and not 1 <= self.pca_targets <= self.patch_dim:
            raise UserError(
                f"model.pca_targets={self.pca_targets} is outside [1, {self.patch_dim}], the values of a patch"
            )
        if self.pca_targets is not None and self.target is None and self.normalize_targets:
            raise UserError("model.pca_targets are components of the pixels: set model.normalize_targets=False")
        if (self.pca_targets is None) == (self.target_name == "principal_components"):
            raise UserError(
                f"model.target={self.target}, model.pca_targets={self.pca_targets}: target=principal_components and a "
                "number of pca_targets go together; set both or neither"
            )
        cross, ratio = self.decoder_attention == "cross", self.prediction_ratio
        if cross and self.encoder_mask_tokens:
            raise UserError(
                "model.decoder_attention=cross attends to visible patches alone: set model.encoder_mask_tokens=False"
            )
        if ratio is None:
            return
        if not cross or self.loss_patches == "all":
            raise UserError(
                f"model.prediction_ratio={ratio} is for model.decoder_attention=cross with model.loss_patches=hidden: "
                "set these, or prediction_ratio=None"
            )
        if not 0 < ratio < 1:
            raise UserError(f"model.prediction_ratio={ratio} is outside (0, 1)")
        if not 1 <= int(self.num_patches * ratio) <= self.num_patches - self.num_visible():
            raise UserError(
                f"model.prediction_ratio={ratio} of {self.num_patches} patches must give at least one and at most the "
                f"{self.num_patches - self.num_visible()} hidden ones"
            )

    def num_visible(
        self, mask_ratio: float | None = None, grid: tuple[int, int] | None = None, name: str = "mask_ratio"
    ) -> int:
        """Number of visible patches in a (rows, columns) grid at a mask ratio, by default the model's.

        Raises UserError if the ratio (called `name`) or the grid does not suit the model's mask sampling.
        """
        mask_ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        rows, columns = grid = self.grid if grid is None else grid
        cell, random = self.mask_cell, self.mask_sampling == "random"
        if cell > 1 and not random:
            raise UserError(f"model.mask_cell={cell} is for model.mask_sampling=random, not {self.mask_sampling}")
        if rows % cell or columns % cell:
            raise UserError(f"model.mask_cell={cell} does not divide the grid of {rows} x {columns} patches")
        visible = check_mask_ratio(mask_ratio, grid, cell, name)
        if self.mask_sampling == "grid" and (mask_ratio != GRID_RATIO or rows % 2 or columns % 2):
            raise UserError(
                f"model.mask_sampling=grid keeps one patch of each 2 x 2: it needs {name}={GRID_RATIO}, not "
                f"{mask_ratio}, and even numbers of patches, not {rows} x {columns}"
            )
        return visible

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
        return self._blocks(self.width, self.num_heads, self.mlp_width)

    @property
    def decoder_blocks(self) -> BlockConfig:
        memory_width = self.width if self.decoder_attention == "cross" else None
        return self._blocks(self.decoder_width, self.decoder_num_heads, self.decoder_mlp_width, memory_width)

    def _blocks(
        self, width: int, num_heads: int, mlp_width: int | None, memory_width: int | None = None
    ) -> BlockConfig:
        return BlockConfig(
            width, num_heads, int(self.mlp_ratio * width) if mlp_width is None else mlp_width,
            self.norm_epsilon, self.activation, self.qkv_bias, self.attention, self.dtype or "float32", self.qk_norm,
            memory_width,
        )  # fmt: skip

    @property
    def patch_dim(self) -> int:
        """Values in a patch: p * p * C."""
        return self.patch_size**2 * self.channels

    @property
    def target_name(self) -> str:
        """`target`, or the name that `pca_targets` and `normalize_targets` imply."""
        if self.target is not None:
            return self.target
        if self.pca_targets is not None:
            return "principal_components"
        return "normalized_pixels" if self.normalize_targets else "pixels"

    @property
    def target_dim(self) -> int:
        """Number of values predicted for a patch."""
        return TARGETS.find(self.target_name).dim(self)


def unroll_on_cpu(config: MAEConfig, mesh: Mesh) -> MAEConfig:
    """If `scan_unroll` is None, unrolls all blocks where that is faster for training on this mesh.

    In a loop, a CPU copies saved activations twice. Deep models stay loops, because of compile time, and so do blocks
    that recompute or gather again instead of saving.
    """
    if config.scan_unroll is not None:
        return config
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    depth = max(config.depth, config.decoder_depth)
    pays = on_cpu and depth <= UNROLLED and not config.remat and mesh.shape["fsdp"] == 1
    return dataclasses.replace(config, scan_unroll=depth if pays else 1)
