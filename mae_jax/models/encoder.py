"""The encoder: a Vision Transformer on the visible patches."""

from collections.abc import Sequence
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
from mae_jax.models.transformer import Recorded, create_blocks, drop_path_scales, scan_blocks, scan_to
from mae_jax.runtime.errors import UserError


class EncoderOutput(NamedTuple):
    """What `encode` returns with any `output_...`; the 1 stands for all class tokens (in the blocks also registers)."""

    features: jax.Array  # [B, 1 + K, D], class token first, after the final norm; K = L without a mask
    hidden_states: jax.Array | None = None  # [depth + 1, B, 1 + K, D], before the final norm
    attentions: jax.Array | None = None  # [depth, B, heads, 1 + K, 1 + K]
    mask: jax.Array | None = None  # [B, L]; 1 = hidden
    ids_restore: jax.Array | None = None  # [B, L]


class Encoder(nnx.Module):
    """ViT on the visible patches; `frozen_blocks` first blocks do not train, `drop_path` has [depth] rates."""

    def __init__(
        self,
        config: MAEConfig,
        *,
        rngs: nnx.Rngs,
        learned_positions: bool = False,  # whatever `config.positions`; for fine-tuning
        frozen_blocks: int = 0,
        drop_path: tuple[float, ...] | None = None,
    ):
        self.config, dtype = config, jnp.dtype(config.blocks.dtype)
        self.frozen_blocks, self.drop_path = frozen_blocks, drop_path

        def bias_init(key, shape, dtype):  # the default of a convolution, as in the released models
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
        *,
        count: jax.Array | None = None,
        hidden: tuple[jax.Array, jax.Array] | None = None,
        keys: jax.Array | None = None,
        record: tuple[bool, bool] = (False, False),
        norm: bool = True,
    ) -> tuple[jax.Array, Recorded]:
        """Encodes patches [B, L, p*p*C] to [B, C + L, D], C class tokens first.

        With ids_keep [B * M, K], M masks of each image, encodes only those patches: [B * M, C + K, D]. With `hidden`
        instead, masks [B * M, L] (1 = hidden) and a mask token [1, 1, D], the token replaces hidden patches (paper,
        Table 1c): [B * M, C + L, D]. Patches are embedded once for all M masks. With `count` [B], only the first so
        many of ids_keep are attended to; what is returned for the others means nothing. Keys [B] turn on drop path.
        """
        x = self._tokens(patches, grid, ids_keep, hidden)
        drops = keys is not None and self.drop_path is not None
        scales = drop_path_scales(keys, np.asarray(self.drop_path)) if drops else None
        if count is not None:
            count = count + self.config.class_tokens + self.config.registers
        options = dict(branch_scales=scales, count=count, frozen=self.frozen_blocks, record=record)
        x, recorded = scan_blocks(self.blocks, x, **options)
        x = self._without_registers(x)
        return self.norm(x) if norm else x, recorded

    def at_layers(self, patches: jax.Array, grid: tuple[int, int], layers: Sequence[int]) -> tuple[jax.Array, ...]:
        """Tokens [B, C + L, D] after each of these blocks, through the final norm. The first is 1, the last also -1."""
        places = tuple(find_layer(layer, self.config.depth) for layer in layers)
        reached = scan_to(self.blocks, self._tokens(patches, grid), places)
        return tuple(self.norm(self._without_registers(reached[place])) for place in places)

    def _tokens(
        self,
        patches: jax.Array,
        grid: tuple[int, int],
        ids_keep: jax.Array | None = None,
        hidden: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """The first block's input: class tokens, registers and patches."""
        config = self.config
        table = position_table(self.positions, config.grid, grid, config.width)
        x = self._embed(patches, table[1:], ids_keep, hidden)
        class_token = self.class_token[...]
        if self.positions is not None:  # the formula's row for the class token is zero
            class_token = class_token + table[0]
        first = [class_token, self.registers[...]] if config.registers else [class_token]
        return jnp.concatenate([*(jnp.broadcast_to(token, (len(x), *token.shape[1:])) for token in first), x], axis=1)

    def _without_registers(self, x: jax.Array) -> jax.Array:
        classes, registers = self.config.class_tokens, self.config.registers
        return jnp.concatenate([x[:, :classes], x[:, classes + registers :]], axis=1) if registers else x

    def _embed(
        self, patches: jax.Array, positions: jax.Array, ids_keep: jax.Array | None, hidden: tuple | None
    ) -> jax.Array:
        """Embeds the visible patches and adds their rows of the position table [L, D]."""
        if hidden is not None:
            mask, token = hidden
            x = jnp.repeat(self.patch_embed(patches), len(mask) // len(patches), axis=0)
            return jnp.where(mask[:, :, None] > 0, token, x) + positions
        if ids_keep is None or len(ids_keep) == len(patches):
            if ids_keep is not None:
                patches, positions = take_patches(patches, ids_keep), take_patches(positions, ids_keep)
            return self.patch_embed(patches) + positions
        x = take_patches(self.patch_embed(patches) + positions, ids_keep.reshape(len(patches), -1))
        return x.reshape(*ids_keep.shape, -1)


def find_layer(layer: int, depth: int, setting: str = "") -> int:
    """A block's number, from 1 to `depth`; -1 stands for the last one. UserError if there is no such block."""
    if not 1 <= abs(layer) <= depth:
        raise UserError(f"{setting}layer {layer}: the encoder has the blocks 1 to {depth}, or -{depth} to -1")
    return layer if layer > 0 else depth + 1 + layer


def check_layers_alone(others: bool) -> None:
    """Raises UserError if `layers` are asked for with `others`, which would be ignored."""
    if others:
        raise UserError("layers=... gives the tokens of whole images: leave out key, noise, mask and output_...")


def position_table(
    learned: nnx.Param | None, own_grid: tuple[int, int], grid: tuple[int, int], width: int
) -> jax.Array:
    """The position table [1 + L, width] for a (rows, columns) grid: computed, or the learned one resized."""
    if learned is None:
        return jnp.asarray(sincos_table(grid, width))
    return resize_positions(learned[...], own_grid, grid)


def patches_of(images: jax.Array, config: MAEConfig) -> tuple[jax.Array, tuple[int, int]]:
    """Patches [B, L, p*p*C] and (rows, columns) grid of images [B, H, W, C]; UserError if they do not fit the model."""
    if images.ndim != 4 or images.shape[-1] != config.channels:
        raise UserError(f"images of shape {images.shape}: the model takes [batch, height, width, {config.channels}]")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise UserError(f"images of type {images.dtype}: the model takes normalised floats, as model.processor makes")
    grid = grid_size(images.shape[1:3], config.patch_size)
    return patchify(jnp.asarray(images, jnp.float32), config.patch_size), grid
