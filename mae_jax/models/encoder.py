"""The encoder: a Vision Transformer on those patches that it is shown."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mae_jax.models.config import MAEConfig
from mae_jax.models.layers import LayerNorm, Linear
from mae_jax.models.masking import take_patches
from mae_jax.models.patches import grid_size, patchify
from mae_jax.models.positions import resize_positions, sincos_table
from mae_jax.models.transformer import NOTHING, Record, Recorded, create_blocks, drop_path_scales, scan_blocks
from mae_jax.runtime.errors import UserError


class EncoderOutput(NamedTuple):
    """What `encode` returns if more than the features is asked for; None what was not asked for.

    1 is the number of class tokens; the tokens of each block have the registers too, if there are any.
    """

    features: jax.Array  # [B, 1 + K, D], class token first, after the final norm; K = L without a mask
    hidden_states: jax.Array | None = None  # [depth + 1, B, 1 + K, D], before the final norm
    attentions: jax.Array | None = None  # [depth, B, heads, 1 + K, 1 + K]
    mask: jax.Array | None = None  # [B, L]; 1 = hidden
    ids_restore: jax.Array | None = None  # [B, L]


class Hidden(NamedTuple):
    """What an encoder sees of hidden patches, if it sees their places at all (paper, Table 1c)."""

    mask: jax.Array  # [B, L]; 1 = hidden
    token: jax.Array  # [1, 1, D]


class Encoder(nnx.Module):
    """ViT on the visible patches.

    Args:
      learned_positions: the position table [1 + L, D] is a parameter that begins as the sine-cosine table, as in
        fine-tuning, whatever `config.positions` says. Without it the table is a formula, as in pre-training.
      frozen_blocks: first blocks that pass no gradient on.
      drop_path: [depth] rates; None: none.
    """

    def __init__(
        self,
        config: MAEConfig,
        *,
        rngs: nnx.Rngs,
        learned_positions: bool = False,
        frozen_blocks: int = 0,
        drop_path: tuple[float, ...] | None = None,
    ):
        self.config, dtype = config, jnp.dtype(config.blocks.dtype)
        self.frozen_blocks, self.drop_path = frozen_blocks, drop_path

        def bias_init(key, shape, dtype):  # the released models' patch embedding keeps a convolution's default bias
            return jax.random.uniform(key, shape, dtype, -(config.patch_dim**-0.5), config.patch_dim**-0.5)

        self.patch_embed = Linear(config.patch_dim, config.width, dtype=dtype, bias_init=bias_init, rngs=rngs)
        self.class_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, config.class_tokens, config.width)))
        if config.registers:
            self.registers = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, config.registers, config.width)))
        learned = learned_positions or config.positions == "learned"
        self.positions = nnx.Param(jnp.array(sincos_table(config.grid, config.width))) if learned else None
        self.blocks = create_blocks(config.depth, config.blocks, rngs=rngs)
        self.norm = LayerNorm(config.width, config.norm_epsilon, rngs=rngs)

    def __call__(
        self,
        patches: jax.Array,
        grid: tuple[int, int],
        ids_keep: jax.Array | None = None,
        hidden: Hidden | None = None,
        record: Record = NOTHING,
    ) -> tuple[jax.Array, Recorded]:
        """Encodes patches [B, L, p*p*C], or only those in ids_keep [B, K]: [B, C + L or K, D], class tokens first.

        With ids_keep [B * M, K], M masks of each image, the patches are embedded once: [B * M, C + K, D].

        Args:
          hidden: instead of ids_keep: the encoder sees all places, at the hidden ones a mask token: [B * M, C + L, D].
        """
        tokens, recorded = self.before_norm(patches, grid, ids_keep, hidden=hidden, record=record)
        return self.norm(tokens), recorded

    def before_norm(
        self,
        patches: jax.Array,
        grid: tuple[int, int],
        ids_keep: jax.Array | None = None,
        hidden: Hidden | None = None,
        keys: jax.Array | None = None,
        record: Record = NOTHING,
    ) -> tuple[jax.Array, Recorded]:
        """The tokens before the final norm. With `keys` [B], one for each example, drop path is applied."""
        config = self.config
        table = position_table(self.positions, config.grid, grid, config.width)
        x = self._embed(patches, table[1:], ids_keep, hidden)
        class_token = self.class_token[...]
        if self.positions is not None:  # the formula's row for the class token is zero
            class_token = class_token + table[0]
        first = [jnp.broadcast_to(class_token, (len(x), *class_token.shape[1:]))]
        if config.registers:
            first.append(jnp.broadcast_to(self.registers[...], (len(x), *self.registers.shape[1:])))
        x = jnp.concatenate([*first, x], axis=1)
        scales = None
        if keys is not None and self.drop_path is not None:
            scales = drop_path_scales(keys, np.asarray(self.drop_path))
        x, recorded = scan_blocks(
            self.blocks, x, remat=config.remat, unroll=config.scan_unroll,
            branch_scales=scales, frozen=self.frozen_blocks, record=record,
        )  # fmt: skip
        if config.registers:
            first, last = config.class_tokens, config.class_tokens + config.registers
            x = jnp.concatenate([x[:, :first], x[:, last:]], axis=1)
        return x, recorded

    def _embed(
        self, patches: jax.Array, positions: jax.Array, ids_keep: jax.Array | None, hidden: Hidden | None
    ) -> jax.Array:
        """Tokens of the patches that the encoder sees, with their positions [L, D]."""
        if hidden is not None:
            x = jnp.repeat(self.patch_embed(patches), len(hidden.mask) // len(patches), axis=0)
            return jnp.where(hidden.mask[:, :, None] > 0, hidden.token, x) + positions
        if ids_keep is None or len(ids_keep) == len(patches):
            if ids_keep is not None:
                patches, positions = take_patches(patches, ids_keep), take_patches(positions, ids_keep)
            return self.patch_embed(patches) + positions
        x = take_patches(self.patch_embed(patches) + positions, ids_keep.reshape(len(patches), -1))
        return x.reshape(*ids_keep.shape, -1)


def position_table(
    learned: nnx.Param | None, own_grid: tuple[int, int], grid: tuple[int, int], width: int
) -> jax.Array:
    """The position table [1 + L, width] for images of a (rows, columns) grid.

    Without a learned table it is computed for that grid; a learned one, of the model's own grid, is resized in 2-D.
    """
    if learned is None:
        return jnp.asarray(sincos_table(grid, width))
    return resize_positions(learned[...], own_grid, grid)


def patches_of(images: jax.Array, config: MAEConfig) -> tuple[jax.Array, tuple[int, int]]:
    """Patches [B, L, p*p*C] of images [B, H, W, C], and their (rows, columns) grid.

    Raises:
      UserError: for images whose shape does not fit the model, or that are not normalised numbers.
    """
    if images.ndim != 4 or images.shape[-1] != config.channels:
        raise UserError(f"images of shape {images.shape}: the model takes [batch, height, width, {config.channels}]")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images of type {images.dtype}: the model takes normalised floats, as model.processor makes")
    grid = grid_size(images.shape[1:3], config.patch_size)
    return patchify(jnp.asarray(images, jnp.float32), config.patch_size), grid
