"""The masked autoencoder: an encoder of the visible patches, a light decoder of all, a loss on the hidden ones.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), section 3. The details that the
paper leaves open are those of the released weights, so that these can be loaded.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mae_jax.models.encoder import Encoder, patches_of
from mae_jax.models.mae_config import MAEConfig, check_mask_ratio
from mae_jax.models.masking import Mask, masks_from_noise, random_masks, take_patches
from mae_jax.models.positions import sincos_table
from mae_jax.models.transformer import Linear, create_blocks, make_norm, scan_blocks


class MAEOutput(NamedTuple):
    """What the autoencoder returns for B images of L patches."""

    loss: jax.Array  # scalar: mean squared error of the hidden patches
    prediction: jax.Array  # [B, L, p*p*C] float32; of every patch, normalised if the targets are
    mask: jax.Array  # [B, L]; 1 = hidden
    ids_restore: jax.Array  # [B, L]
    example_loss: jax.Array  # [B]; `loss` is its mean


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
        patches, grid = patches_of(images, self.config)
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
        patches, grid = patches_of(images, self.config)
        return self.encoder(patches, grid)

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
