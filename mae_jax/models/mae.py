"""The masked autoencoder: an encoder of the visible patches, a light decoder of all, a loss on the hidden ones.

He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), section 3. The details that the
paper leaves open are those of the released weights, so that these can be loaded.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mae_jax.errors import UserError
from mae_jax.models.encoder import Encoder, EncoderOutput, patches_of, position_table
from mae_jax.models.mae_config import MAEConfig, check_mask_ratio
from mae_jax.models.masking import Mask, masks_from_noise, random_masks, take_patches
from mae_jax.models.parameters import gather_outside_blocks
from mae_jax.models.patches import grid_size, patchify, unpatchify
from mae_jax.models.positions import sincos_table
from mae_jax.models.reconstruction import normalize_patches, reconstruct
from mae_jax.models.transformer import NOTHING, Linear, Record, Recorded, create_blocks, make_norm, scan_blocks


class MAEOutput(NamedTuple):
    """What the autoencoder returns for B images of L patches, of which the encoder sees K."""

    loss: jax.Array  # scalar: mean squared error of the hidden patches
    prediction: jax.Array  # [B, L, p*p*C] float32; of every patch, normalised if the targets are
    mask: jax.Array  # [B, L]; 1 = hidden
    ids_restore: jax.Array  # [B, L]
    example_loss: jax.Array  # [B]; `loss` is its mean
    # On request, of the encoder's and the decoder's blocks (transformer.Recorded), [depth + 1, B, 1 + K or L, D] and
    # [depth, B, heads, 1 + K or L, 1 + K or L]:
    hidden_states: jax.Array | None = None
    attentions: jax.Array | None = None
    decoder_hidden_states: jax.Array | None = None
    decoder_attentions: jax.Array | None = None


class Decoder(nnx.Module):
    """Predicts the pixels of every patch from the encoded visible ones and mask tokens."""

    def __init__(self, config: MAEConfig, *, rngs: nnx.Rngs):
        self.config, dtype, width = config, jnp.dtype(config.dtype), config.decoder_width
        self.embed = Linear(config.width, width, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, width)))
        learned = config.positions == "learned"
        self.positions = nnx.Param(jnp.array(sincos_table(config.grid, width))) if learned else None
        self.blocks = create_blocks(config.decoder_depth, config.decoder_blocks, rngs=rngs)
        self.norm = make_norm(width, config.norm_epsilon, rngs=rngs)
        self.predict = Linear(width, config.patch_dim, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        grid: tuple[int, int],
        ids_restore: jax.Array,
        record: Record = NOTHING,
    ) -> tuple[jax.Array, Recorded]:
        """Decodes tokens [B, 1 + K, D] of K visible patches: predictions [B, L, p*p*C] in float32."""
        x = self.embed(tokens)
        b, n, d = x.shape
        hidden = jnp.broadcast_to(self.mask_token[...], (b, ids_restore.shape[1] + 1 - n, d))
        patches = take_patches(jnp.concatenate([x[:, 1:], hidden], axis=1), ids_restore)
        x = jnp.concatenate([x[:, :1], patches], axis=1)
        x = x + position_table(self.positions, self.config.grid, grid, d)
        x, recorded = scan_blocks(
            self.blocks, x, remat=self.config.remat, unroll=self.config.scan_unroll, record=record
        )
        return self.predict(self.norm(x[:, 1:])), recorded


class MaskedAutoencoder(nnx.Module):
    """MAE: `model(images, key=key)` reconstructs, `model.encode(images)` gives features.

    Images of any size that the patch size divides are accepted: fixed positions are formulas, learned ones are resized.

    Args:
      decoder: without one, the model can only encode.

    Attributes:
      processor: turns pictures into images for this model and back; set by `mae_jax.load`.
    """

    def __init__(self, config: MAEConfig, *, rngs: nnx.Rngs, decoder: bool = True):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs) if decoder else None
        self.processor = None

    def __call__(
        self,
        images: jax.Array,
        *,
        key: jax.Array | None = None,
        noise: jax.Array | None = None,
        mask_ratio: float | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> MAEOutput:
        """Hides patches of each image, and predicts them.

        Args:
          images: [B, H, W, C], normalised (channel mean and standard deviation).
          key: a key for the batch, or [B] keys, one for each image: draws the masks.
          noise: [B, L], instead of a key: the patches with the smallest values stay visible.
          mask_ratio: instead of the model's own; a Python float, since shapes depend on it. With ratio 0 nothing is
            hidden, and the loss is the mean over all patches: a plain autoencoder's.
          output_hidden_states, output_attentions: also return those of each block.

        Raises:
          UserError: for images whose shape does not fit the model, a mask ratio outside [0, 1), or a model without
            decoder.
          ValueError: unless exactly one of key and noise is given, in a shape that fits.
        """
        if self.decoder is None:
            raise UserError(
                "this model has no decoder (its file holds only the encoder), so it cannot reconstruct: use "
                "model.encode(images), or load a file with the decoder (of the released ones mae_pretrain_vit_*_full "
                "or mae_visualize_vit_*)"
            )
        patches, grid = patches_of(images, self.config)
        masks = self._masks(patches.shape[:2], key, noise, mask_ratio)
        record = Record(output_hidden_states, output_attentions)
        tokens, encoder = self.encoder(patches, grid, masks.ids_keep, record)
        prediction, decoder = self.decoder(tokens, grid, masks.ids_restore, record)
        targets = normalize_patches(patches) if self.config.normalize_targets else patches
        error = jnp.mean((prediction - targets) ** 2, axis=-1)
        some_hidden = masks.ids_keep.shape[1] < patches.shape[1]
        counted = masks.mask if some_hidden else jnp.ones_like(masks.mask)
        example_loss = jnp.sum(error * counted, axis=1) / jnp.sum(counted, axis=1)
        loss = jnp.mean(example_loss)
        return MAEOutput(loss, prediction, masks.mask, masks.ids_restore, example_loss, *encoder, *decoder)

    def encode(
        self,
        images: jax.Array,
        key: jax.Array | None = None,
        mask_ratio: float | None = None,
        *,
        noise: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_masks: bool = False,
    ) -> jax.Array | EncoderOutput:
        """Features of images [B, H, W, C]: [B, 1 + L, D], class token first, after the final norm.

        With a key or noise (as in `__call__`), features [B, 1 + K, D] of the K patches that stay visible at
        `mask_ratio` (None: the model's own), in the shuffled order of the mask.

        Returns:
          The features alone; or an EncoderOutput, if any `output_...` is asked for.

        Raises:
          UserError: for images whose shape does not fit the model, or a mask ratio outside [0, 1).
          ValueError: for a mask ratio, or the masks wanted, without key and noise; or noise in a shape that does not
            fit.
        """
        patches, grid = patches_of(images, self.config)
        masks = None
        if key is not None or noise is not None or mask_ratio is not None or output_masks:
            masks = self._masks(patches.shape[:2], key, noise, mask_ratio)
        record = Record(output_hidden_states, output_attentions)
        features, recorded = self.encoder(patches, grid, masks and masks.ids_keep, record)
        if not (any(record) or output_masks):
            return features
        return EncoderOutput(features, *recorded, *((masks.mask, masks.ids_restore) if output_masks else ()))

    def patchify(self, images: jax.Array) -> jax.Array:
        """Cuts images [B, H, W, C] into patches [B, L, p*p*C], as predictions have them."""
        return patchify(images, self.config.patch_size)

    def unpatchify(self, patches: jax.Array, image_size: int | tuple[int, int] | None = None) -> jax.Array:
        """Puts patches [B, L, p*p*C] together to images [B, H, W, C] of `image_size` (None: the model's).

        Raises:
          UserError: for another number of patches than images of this size have.
        """
        size = self.config.image_size if image_size is None else image_size
        grid = grid_size((size, size) if isinstance(size, int) else size, self.config.patch_size)
        if patches.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"{patches.shape[1]} patches are none of {size} pixels: give their image_size=(height, width)"
            )
        return unpatchify(patches, self.config.patch_size, grid)

    def reconstruct(
        self,
        images: jax.Array,
        key: jax.Array | None = None,
        mask_ratio: float | None = None,
        *,
        noise: jax.Array | None = None,
        paste_visible: bool = True,
    ) -> jax.Array:
        """Pictures uint8 [B, H, W, C] of images [B, H, W, C] (normalised) whose hidden patches are predicted.

        With normalised targets, each predicted patch is drawn with the true patch's mean and variance.

        Args:
          key, noise, mask_ratio: of the masks, as in `__call__`; without key and noise they are drawn from key 0.
          paste_visible: show the visible patches as they are, not as predicted.

        Raises:
          UserError: as `__call__`; or for a model without a processor.
        """
        if self.processor is None:
            raise UserError("this model has no processor: set model.processor = mae_jax.Processor(...)")
        if key is None and noise is None:
            key = jax.random.key(0)
        output = self(images, key=key, noise=noise, mask_ratio=mask_ratio)
        images, normalized = jnp.asarray(images, jnp.float32), self.config.normalize_targets
        found = reconstruct(images, output.prediction, output.mask, self.config.patch_size, normalized)
        return self.processor.to_pictures(found.pasted if paste_visible else found.prediction)

    def _masks(self, shape: tuple[int, int], key, noise, mask_ratio: float | None) -> Mask:
        batch, num_patches = shape
        mask_ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        check_mask_ratio(mask_ratio, num_patches)
        if (key is None) == (noise is None):
            raise ValueError("give either key= or noise=: the masks need one source of randomness")
        if noise is not None:
            if noise.shape != shape:
                raise ValueError(f"noise of shape {noise.shape}: {shape} (batch, patches) is needed")
            return masks_from_noise(jnp.asarray(noise, jnp.float32), mask_ratio)
        if not hasattr(key, "dtype"):
            raise ValueError(f"key={key!r} is not a JAX key; give key=jax.random.key(0), and a ratio as mask_ratio=")
        key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
        keys = jax.random.split(key, batch) if key.ndim == 0 else key
        if keys.shape != (batch,):
            raise ValueError(f"keys of shape {keys.shape}: one key, or one for each of {batch} images, is needed")
        return random_masks(keys, num_patches, mask_ratio)


def init_params(config: MAEConfig, key: jax.Array) -> dict:
    """Initial parameters as a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(MaskedAutoencoder(config, rngs=nnx.Rngs(key))))


@functools.lru_cache(maxsize=16)  # tracing a model takes longer than loading it
def _split(config: MAEConfig, decoder: bool) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: MaskedAutoencoder(config, rngs=nnx.Rngs(0), decoder=decoder)))


def abstract_params(config: MAEConfig, *, decoder: bool = True) -> dict:
    """Shapes and types of the parameters as a nested dict."""
    return nnx.to_pure_dict(_split(config, decoder)[1])


def make_bind(config: MAEConfig, *, decoder: bool = True) -> Callable[[dict], MaskedAutoencoder]:
    """A pure function from parameters (a nested dict, as `init_params` makes) to the model that has them."""
    graphdef, _ = _split(config, decoder)
    return lambda params: nnx.merge(graphdef, gather_outside_blocks(params))
