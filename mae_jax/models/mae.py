"""The masked autoencoder: an encoder of the visible patches, a light decoder of all, a loss on the hidden ones.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), section 3. The details that the
paper leaves open are those of the released weights, so that these can be loaded.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_jax.errors import UserError
from mae_jax.models.masking import Mask, masks_from_noise, num_visible, random_masks, take_patches
from mae_jax.models.patches import grid_size, patchify
from mae_jax.models.positions import sincos_table
from mae_jax.models.transformer import Linear, create_blocks, make_norm, scan_blocks

# The named encoders. tiny, small: DeiT (arXiv 2012.12877); base, large, huge: ViT (arXiv 2010.11929), as in the paper.
SIZES = {
    "tiny": dict(width=192, depth=12, num_heads=3, patch_size=16),
    "small": dict(width=384, depth=12, num_heads=6, patch_size=16),
    "base": dict(width=768, depth=12, num_heads=12, patch_size=16),
    "large": dict(width=1024, depth=24, num_heads=16, patch_size=16),
    "huge": dict(width=1280, depth=32, num_heads=16, patch_size=14),
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
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"model.dtype={self.dtype!r} is not one of float32, bfloat16")
        if not self.norm_epsilon > 0:
            raise UserError(f"model.norm_epsilon={self.norm_epsilon} must be above 0")
        if min(self.mlp_width, self.decoder_mlp_width) < 1:
            raise UserError(f"model.mlp_ratio={self.mlp_ratio} leaves the MLPs no hidden unit")
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
    def mlp_width(self) -> int:
        """Hidden units of the encoder's MLPs."""
        return int(self.mlp_ratio * self.width)

    @property
    def decoder_mlp_width(self) -> int:
        """Hidden units of the decoder's MLPs."""
        return int(self.mlp_ratio * self.decoder_width)

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


class MAEOutput(NamedTuple):
    """What the autoencoder returns for B images of L patches."""

    loss: jax.Array  # scalar: mean squared error of the hidden patches
    prediction: jax.Array  # [B, L, p*p*C] float32; of every patch, normalised if the targets are
    mask: jax.Array  # [B, L]; 1 = hidden
    ids_restore: jax.Array  # [B, L]
    example_loss: jax.Array  # [B]; `loss` is its mean


class Encoder(nnx.Module):
    """ViT on the visible patches."""

    def __init__(self, config: MAEConfig, *, rngs: nnx.Rngs):
        self.config, dtype = config, jnp.dtype(config.dtype)

        def bias_init(key, shape, dtype):  # the released models' patch embedding keeps a convolution's default bias
            return jax.random.uniform(key, shape, dtype, -(config.patch_dim**-0.5), config.patch_dim**-0.5)

        self.patch_embed = Linear(config.patch_dim, config.width, dtype=dtype, bias_init=bias_init, rngs=rngs)
        self.class_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, config.width)))
        self.blocks = create_blocks(
            config.depth, config.width, config.num_heads, config.mlp_width,
            epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.norm = make_norm(config.width, config.norm_epsilon, rngs=rngs)

    def __call__(self, patches: jax.Array, grid: tuple[int, int], ids_keep: jax.Array | None = None) -> jax.Array:
        """Encodes patches [B, L, p*p*C], or only those in ids_keep [B, K]: tokens [B, 1 + L or K, D], class first."""
        positions = jnp.asarray(sincos_table(grid, self.config.width)[1:])
        if ids_keep is not None:
            patches, positions = take_patches(patches, ids_keep), take_patches(positions, ids_keep)
        x = self.patch_embed(patches) + positions
        class_token = jnp.broadcast_to(self.class_token[...], (len(x), 1, self.config.width))
        x = jnp.concatenate([class_token, x], axis=1)
        x = scan_blocks(self.blocks, x, remat=self.config.remat, unroll=self.config.scan_unroll)
        return self.norm(x)


class Decoder(nnx.Module):
    """Predicts the pixels of every patch from the encoded visible ones and mask tokens."""

    def __init__(self, config: MAEConfig, *, rngs: nnx.Rngs):
        self.config, dtype, width = config, jnp.dtype(config.dtype), config.decoder_width
        self.embed = Linear(config.width, width, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        self.blocks = create_blocks(
            config.decoder_depth, width, config.decoder_num_heads, config.decoder_mlp_width,
            epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        self.norm = make_norm(width, config.norm_epsilon, rngs=rngs)
        self.predict = Linear(width, config.patch_dim, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, grid: tuple[int, int], ids_restore: jax.Array) -> jax.Array:
        """Decodes tokens [B, 1 + K, D] of K visible patches: predictions [B, L, p*p*C] in float32."""
        x = self.embed(tokens)
        b, n, d = x.shape
        hidden = jnp.broadcast_to(self.mask_token[...], (b, ids_restore.shape[1] + 1 - n, d))
        patches = take_patches(jnp.concatenate([x[:, 1:], hidden], axis=1), ids_restore)
        x = jnp.concatenate([x[:, :1], patches], axis=1) + jnp.asarray(sincos_table(grid, d))
        x = scan_blocks(self.blocks, x, remat=self.config.remat, unroll=self.config.scan_unroll)
        return self.predict(self.norm(x[:, 1:]))


class MaskedAutoencoder(nnx.Module):
    """MAE: `model(images, key=key)` reconstructs, `model.encode(images)` gives features.

    Images of any size that the patch size divides are accepted, since positions are formulas.
    """

    def __init__(self, config: MAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        *,
        key: jax.Array | None = None,
        noise: jax.Array | None = None,
        mask_ratio: float | None = None,
    ) -> MAEOutput:
        """Hides patches of each image, and predicts them.

        Args:
          images: [B, H, W, C], normalised (channel mean and standard deviation).
          key: a key for the batch, or [B] keys, one for each image: draws the masks.
          noise: [B, L], instead of a key: the patches with the smallest values stay visible.
          mask_ratio: instead of the model's own; a Python float, since shapes depend on it. With ratio 0 nothing is
            hidden, and the loss is the mean over all patches: a plain autoencoder's.

        Raises:
          UserError: for images whose shape does not fit the model, or a mask ratio outside [0, 1).
          ValueError: unless exactly one of key and noise is given, in a shape that fits.
        """
        patches, grid = self._patches(images)
        mask_ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        masks = self._masks(patches.shape[:2], key, noise, mask_ratio)
        tokens = self.encoder(patches, grid, masks.ids_keep)
        prediction = self.decoder(tokens, grid, masks.ids_restore)
        targets = normalize_patches(patches) if self.config.normalize_targets else patches
        error = jnp.mean((prediction - targets) ** 2, axis=-1)
        some_hidden = masks.ids_keep.shape[1] < patches.shape[1]
        counted = masks.mask if some_hidden else jnp.ones_like(masks.mask)
        example_loss = jnp.sum(error * counted, axis=1) / jnp.sum(counted, axis=1)
        return MAEOutput(jnp.mean(example_loss), prediction, masks.mask, masks.ids_restore, example_loss)

    def encode(self, images: jax.Array) -> jax.Array:
        """Features of images [B, H, W, C], nothing hidden: [B, 1 + L, D], class token first, after the final norm.

        Raises:
          UserError: for images whose shape does not fit the model.
        """
        patches, grid = self._patches(images)
        return self.encoder(patches, grid)

    def _patches(self, images: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
        channels = self.config.channels
        if images.ndim != 4 or images.shape[-1] != channels:
            raise UserError(f"images of shape {images.shape}: the model takes [batch, height, width, {channels}]")
        grid = grid_size(images.shape[1:3], self.config.patch_size)
        return patchify(jnp.asarray(images, jnp.float32), self.config.patch_size), grid

    def _masks(self, shape: tuple[int, int], key, noise, mask_ratio: float) -> Mask:
        batch, num_patches = shape
        check_mask_ratio(mask_ratio, num_patches)
        if (key is None) == (noise is None):
            raise ValueError("give either key= or noise=: the masks need one source of randomness")
        if noise is not None:
            if noise.shape != shape:
                raise ValueError(f"noise of shape {noise.shape}: {shape} (batch, patches) is needed")
            return masks_from_noise(jnp.asarray(noise, jnp.float32), mask_ratio)
        key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
        keys = jax.random.split(key, batch) if key.ndim == 0 else key
        if keys.shape != (batch,):
            raise ValueError(f"keys of shape {keys.shape}: one key, or one for each of {batch} images, is needed")
        return random_masks(keys, num_patches, mask_ratio)


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and unbiased variance of each patch [B, L, p*p*C] over all its values: [B, L, 1] each."""
    return jnp.mean(patches, axis=-1, keepdims=True), jnp.var(patches, axis=-1, keepdims=True, ddof=1)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """The targets of section 3 (reconstruction target): (x - mean) / sqrt(variance + 1e-6), patch by patch."""
    mean, variance = patch_statistics(patches)
    return (patches - mean) * jax.lax.rsqrt(variance + 1e-6)


def denormalize_patches(normalized: jax.Array, patches: jax.Array) -> jax.Array:
    """Inverts `normalize_patches` with the statistics of the true patches: a prediction drawn so knows them."""
    mean, variance = patch_statistics(patches)
    return normalized * jnp.sqrt(variance + 1e-6) + mean


def init_params(config: MAEConfig, key: jax.Array) -> dict:
    """Initial parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(MaskedAutoencoder(config, rngs=nnx.Rngs(key))))


def make_bind(config: MAEConfig) -> Callable[[dict], MaskedAutoencoder]:
    """A pure function from parameters (a nested dict, as `init_params` makes) to the model that has them."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: MaskedAutoencoder(config, rngs=nnx.Rngs(0))))
    return lambda params: nnx.merge(graphdef, params)


def count_parameters(parameters) -> int:
    """Number of values in a tree of arrays (or of their shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameters))
