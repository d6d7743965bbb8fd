"""The masked autoencoder (He et al. 2021, arXiv 2111.06377, section 3); details as in the released weights."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from mae_jax.models import masking
from mae_jax.models.config import MAEConfig
from mae_jax.models.decoder import Decoder
from mae_jax.models.encoder import Encoder, EncoderOutput, check_layers_alone, patches_of
from mae_jax.models.masking import Mask, MaskFn, take_patches
from mae_jax.models.parameters import binder, split
from mae_jax.models.patches import grid_size, patchify, unpatchify
from mae_jax.models.targets import TARGETS, reconstruct
from mae_jax.models.transformer import Recorded
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.sharding import all_rows

PREDICTED = 2**31 - 1  # folded into a mask's key; split(key)[i] is fold_in(key, i), so small numbers are taken


class MAEOutput(NamedTuple):
    """The autoencoder's output for B images of L patches, K of them visible."""

    loss: jax.Array  # scalar: mean squared error of the hidden patches, or of all (model.loss_patches, ratio 0)
    prediction: jax.Array  # [B, L, p*p*C] float32, for every patch; normalised if the targets are
    mask: jax.Array  # [B, L]; 1 = hidden
    ids_restore: jax.Array  # [B, L]
    example_loss: jax.Array  # [B]; `loss` is its mean
    # On request: transformer.Recorded of the encoder's 1 + K tokens, and of the decoder's 1 + L.
    hidden_states: jax.Array | None = None
    attentions: jax.Array | None = None
    decoder_hidden_states: jax.Array | None = None
    decoder_attentions: jax.Array | None = None


class MaskedAutoencoder(nnx.Module):
    """MAE: `model(images, key=key)` reconstructs, `model.encode(images)` gives features, also without a decoder.

    Accepts images of any size that the patch size divides: fixed positions are computed, learned ones resized.
    `processor`, set by `mae_jax.load`, converts pictures to model inputs and back.
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
        mask: np.ndarray | MaskFn | Mask | None = None,
        mask_ratio: float | None = None,
        valid: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> MAEOutput:
        """Hides patches of each image [B, H, W, C] and predicts them; ValueError if something does not fit the model.

        Args (one of key, noise and mask):
          key: draws the masks; one for the batch, or [B].
          noise: [B, L]; the patches with the smallest values stay visible.
          mask: [L] or [rows, columns] for all images, or [B, ...]; nonzero patches are hidden. Or a function (image
            index, (rows, columns)) -> [L] or [rows, columns]. Every image needs the same number of visible patches.
          mask_ratio: overrides the model's; a Python float. At 0 the loss is over all patches.
          valid: bool [B, H, W, C], False where the images have no data: such values are 0 to the encoder, and the loss
            and the patches' mean and variance leave them out.
        """
        if self.decoder is None:
            raise UserError(
                "this model has no decoder (its file holds only the encoder): use model.encode(images), or load a file "
                "with the decoder (of the released ones mae_pretrain_vit_*_full or mae_visualize_vit_*)"
            )
        patches, grid, valid = self._patches(images, valid)
        masks = self._masks(patches, grid, key, noise, mask, mask_ratio)
        record = (output_hidden_states, output_attentions)
        tokens, encoder = self._encode(patches, grid, masks, record)
        prediction, decoder = self.decoder(tokens, grid, masks.ids_restore, record, count=masks.count)
        example_loss = self._example_loss(prediction, *self._targets(patches, valid), masks)
        prediction, loss = self.decoder.basis.to_patches(prediction), jnp.mean(example_loss)
        return MAEOutput(loss, prediction, masks.mask, masks.ids_restore, example_loss, *encoder, *decoder)

    def training_loss(
        self, images: jax.Array, keys: jax.Array, valid: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss of images [B, H, W, C] under mask keys [B], and its parts if it has several.

        `valid`: where the images have data; see `__call__`.
        """
        config = self.config
        patches, grid, valid = self._patches(images, valid)
        (targets, counted), repeated = self._targets(patches, valid), patches
        if config.masks_per_image > 1:  # data2vec 2.0 (arXiv 2212.07525, section 3.3)
            keys = jax.vmap(lambda key: jax.random.split(key, config.masks_per_image))(keys).reshape(-1)
            each = functools.partial(jnp.repeat, repeats=config.masks_per_image, axis=0)
            targets, counted, repeated = jax.tree.map(each, (targets, counted, patches))
        masks = self._masks(repeated, grid, keys)
        tokens, _ = self._encode(patches, grid, masks)
        count, ids = config.num_predicted(grid), None
        if config.decoder_attention == "cross" and count < masks.mask.shape[1]:  # predict these patches [B, count] only
            ids = masking.some_hidden(jax.vmap(jax.random.fold_in, (0, None))(keys, PREDICTED), masks, count)
        prediction, _ = self.decoder(tokens, grid, masks.ids_restore, ids=ids)
        if ids is None:
            example_loss = self._example_loss(prediction, targets, counted, masks)
        else:
            targets, counted = jax.tree.map(lambda x: take_patches(x, ids), (targets, counted))
            example_loss = self._example_loss(prediction, targets, counted)
        loss = jnp.mean(example_loss)
        if not config.uniformity:
            return loss, {}
        features = jnp.mean(tokens[:, config.class_tokens :], axis=1)
        alike = uniformity(jnp.mean(features.reshape(len(images), -1, config.width), axis=1))
        return loss + config.uniformity * alike, {"reconstruction_loss": loss, "uniformity": alike}

    def _encode(
        self, patches: jax.Array, grid: tuple[int, int], masks: Mask, record: tuple[bool, bool] = (False, False)
    ) -> tuple[jax.Array, Recorded]:
        if self.config.encoder_mask_tokens:
            return self.encoder(patches, grid, hidden=(masks.mask, self.decoder.mask_token[...]), record=record)
        return self.encoder(patches, grid, masks.ids_keep, count=masks.count, record=record)

    def _patches(
        self, images: jax.Array, valid: jax.Array | None
    ) -> tuple[jax.Array, tuple[int, int], jax.Array | None]:
        """Patches [B, L, p*p*C], 0 where they have no data, their grid, and where they have data (None: everywhere)."""
        patches, grid = patches_of(images, self.config)
        if valid is None:
            return patches, grid, None
        if valid.shape != images.shape:
            raise UserError(f"valid of shape {valid.shape}: it must be that of the images, {images.shape}")
        valid = patchify(valid, self.config.patch_size)
        return jnp.where(valid, patches, 0), grid, valid

    def _targets(self, patches: jax.Array, valid: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Targets [B, L, dim], and which of them count, bool [B, L, dim or 1] (None: all)."""
        basis = self.decoder.basis
        return (basis(patches), None) if valid is None else (basis(patches, valid), basis.counted(valid))

    def _example_loss(
        self, prediction: jax.Array, targets: jax.Array, counted: jax.Array | None, masks: Mask | None = None
    ) -> jax.Array:
        """Mean squared error [B] of the targets that count, in the patches that count; 0 where there are none.

        Without masks all these patches count, else those of `loss_patches`.
        """
        error = (prediction - targets) ** 2
        if counted is None and masks is None:
            return jnp.mean(error, axis=(1, 2))
        error = jnp.mean(error if counted is None else jnp.where(counted, error, 0), axis=-1)
        weights = jnp.ones(error.shape)
        if masks is not None and self.config.loss_patches == "hidden" and masks.ids_hidden.shape[1]:
            weights = masks.mask
        if counted is None:
            return jnp.sum(error * weights, axis=1) / jnp.sum(weights, axis=1)
        total = jnp.sum(weights * jnp.mean(counted, axis=-1), axis=1)
        return jnp.sum(error * weights, axis=1) / jnp.where(total > 0, total, 1)

    def encode(
        self,
        images: jax.Array,
        key: jax.Array | None = None,
        mask_ratio: float | None = None,
        *,
        noise: jax.Array | None = None,
        mask: np.ndarray | MaskFn | Mask | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_masks: bool = False,
        layers: Sequence[int] | None = None,
    ) -> jax.Array | EncoderOutput | tuple[jax.Array, ...]:
        """Features [B, 1 + L, D] of images [B, H, W, C] after the final norm, class token(s) first.

        With a key, noise or mask (see `__call__`), those [B, 1 + K, D] of the K visible patches in the mask's shuffled
        order, even if the encoder was trained with mask tokens. With any `output_...`, returns an EncoderOutput.

        With `layers` alone, a tuple of the features after each of these blocks (`Encoder.at_layers`), as (6, -1).
        """
        patches, grid = patches_of(images, self.config)
        masked = output_masks or any(given is not None for given in (key, noise, mask, mask_ratio))
        record = (output_hidden_states, output_attentions)
        if layers is not None:
            check_layers_alone(masked or any(record))
            return self.encoder.at_layers(patches, grid, layers)
        masks = self._masks(patches, grid, key, noise, mask, mask_ratio) if masked else None
        ids, count = (masks.ids_keep, masks.count) if masks else (None, None)
        features, recorded = self.encoder(patches, grid, ids, count=count, record=record)
        if not (any(record) or output_masks):
            return features
        return EncoderOutput(features, *recorded, *((masks.mask, masks.ids_restore) if output_masks else ()))

    def patchify(self, images: jax.Array) -> jax.Array:
        """Cuts images [B, H, W, C] into patches [B, L, p*p*C], the layout of predictions."""
        return patchify(images, self.config.patch_size)

    def unpatchify(self, patches: jax.Array, image_size: int | tuple[int, int] | None = None) -> jax.Array:
        """Inverts `patchify` for images of `image_size` (default: the model's); UserError if L does not fit it."""
        size = self.config.image_size if image_size is None else image_size
        grid = grid_size((size, size) if isinstance(size, int) else size, self.config.patch_size)
        if patches.shape[1] != grid[0] * grid[1]:
            raise UserError(
                f"{patches.shape[1]} patches do not fit images of {size} pixels: give their image_size=(height, width)"
            )
        return unpatchify(patches, self.config.patch_size, grid)

    def reconstruct(
        self,
        images: jax.Array,
        key: jax.Array | None = None,
        mask_ratio: float | None = None,
        *,
        noise: jax.Array | None = None,
        mask: np.ndarray | MaskFn | Mask | None = None,
        valid: jax.Array | None = None,
        paste_visible: bool = True,
    ) -> jax.Array:
        """Pictures (`Processor.to_pictures`) of images [B, H, W, C], hidden patches predicted.

        Masks and `valid` as in `__call__`, but key 0 if there is none.
        """
        if self.processor is None:
            raise UserError("this model has no processor: set model.processor = mae_jax.Processor(...)")
        if key is None and noise is None and mask is None:
            key = jax.random.key(0)
        output = self(images, key=key, noise=noise, mask=mask, mask_ratio=mask_ratio, valid=valid)
        images, normalized = jnp.asarray(images, jnp.float32), self.decoder.basis.normalized
        found = reconstruct(images, output.prediction, output.mask, self.config.patch_size, normalized, valid)
        return self.processor.to_pictures(found.pasted if paste_visible else found.prediction)

    def _masks(
        self, patches: jax.Array, grid: tuple[int, int], key=None, noise=None, mask=None, mask_ratio=None
    ) -> Mask:
        batch, num_patches = patches.shape[:2]
        if sum(given is not None for given in (key, noise, mask)) != 1:
            raise ValueError("give one of key=, noise= and mask=: the masks need one source")
        if mask is not None and mask_ratio is not None:
            raise ValueError(f"mask_ratio={mask_ratio} cannot be given with mask=, which decides that: leave it out")
        if isinstance(mask, Mask):
            return mask
        if mask is not None:
            return masking.given_masks(*masking.check_given_mask(mask, batch, grid))
        ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
        if noise is not None:
            if noise.shape != (batch, num_patches):
                raise ValueError(f"noise of shape {noise.shape}: {(batch, num_patches)} (batch, patches) is needed")
            return masking.masks_from_noise(jnp.asarray(noise, jnp.float32), ratio)
        self.config.num_visible(ratio, grid)  # checks the ratio
        if not hasattr(key, "dtype"):
            raise ValueError(f"key={key!r} is not a JAX key; give key=jax.random.key(0), and a ratio as mask_ratio=")
        key = key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
        keys = jax.random.split(key, batch) if key.ndim == 0 else key
        if keys.shape != (batch,):
            raise ValueError(f"keys of shape {keys.shape}: one key, or one for each of {batch} images, is needed")
        return masking.draw_masks(keys, patches, grid, ratio, self.config)


def uniformity(features: jax.Array) -> jax.Array:
    """The mean squared cosine of different images' features [B, D] (U-MAE, arXiv 2210.08344, section 4)."""
    features = features / jnp.linalg.norm(features, axis=1, keepdims=True)
    others = all_rows(features)
    cosines = jnp.matmul(features, others.T, precision="highest")
    own = jnp.sum(features**2, axis=1) ** 2  # each image with itself; the authors' code adds this constant
    return (jnp.sum(cosines**2) - jnp.sum(own)) / (len(features) * max(len(others) - 1, 1))


def init_params(config: MAEConfig, key: jax.Array) -> dict:
    """Initial parameters: a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(MaskedAutoencoder(config, rngs=nnx.Rngs(key))))


def split_fixed(config: MAEConfig, variables: dict) -> tuple[dict, dict]:
    """Splits a model's variables into trained parameters and those fitted to the data beforehand."""
    _, shapes = split(MaskedAutoencoder, config, decoder=True)
    fixed = flatten_dict(nnx.to_pure_dict(nnx.filter_state(shapes, nnx.Not(nnx.Param))))
    trees: tuple[dict, dict] = {}, {}
    for path, leaf in flatten_dict(variables).items():
        trees[path in fixed][path] = leaf
    return unflatten_dict(trees[0]), unflatten_dict(trees[1])


def fit_fixed(config: MAEConfig, batches: Iterable[np.ndarray]) -> dict:
    """Fits the target's variables to batches of normalised images [b, H, W, C], NaN: no data; returns a nested dict."""
    return {"decoder": {"basis": TARGETS.find(config.target_name)(config).fit(batches)}}


def abstract_params(config: MAEConfig, *, decoder: bool = True) -> dict:
    """Shapes and dtypes of the parameters, as a nested dict."""
    return nnx.to_pure_dict(split(MaskedAutoencoder, config, decoder=decoder)[1])


def make_bind(config: MAEConfig, *, decoder: bool = True) -> Callable[[dict], MaskedAutoencoder]:
    """A pure function from parameters (a nested dict, as from `init_params`) to the model."""
    return binder(MaskedAutoencoder, config, decoder=decoder)
