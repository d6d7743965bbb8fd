"""The decoder: from the encoder's tokens to predicted patches."""

import jax
import jax.numpy as jnp
from flax import nnx

from mae_jax.models.config import MAEConfig
from mae_jax.models.encoder import position_table
from mae_jax.models.layers import Linear, PreNorm
from mae_jax.models.masking import take_patches
from mae_jax.models.positions import sincos_table
from mae_jax.models.targets import TARGETS
from mae_jax.models.transformer import Recorded, create_blocks, scan_blocks


class Decoder(nnx.Module):
    """Predicts patches from encoded visible patches and mask tokens (which an encoder that sees them uses instead).

    With cross-attention (CrossMAE, arXiv 2401.14391, section 3.2), mask tokens attend to the encoder's tokens but not
    to one another, so that any subset of patches can be predicted.
    """

    def __init__(self, config: MAEConfig, *, rngs: nnx.Rngs):
        self.config, dtype, width = config, jnp.dtype(config.blocks.dtype), config.decoder_width
        cross = config.decoder_attention == "cross"
        self.embed = None if cross else Linear(config.width, width, dtype=dtype, rngs=rngs)
        token_width = config.width if config.encoder_mask_tokens else width
        self.mask_token = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 1, token_width)))
        learned = config.positions == "learned"
        self.positions = nnx.Param(jnp.array(sincos_table(config.grid, width))) if learned else None
        self.blocks = create_blocks(config.decoder_depth, config.decoder_blocks, rngs=rngs)
        self.norm = PreNorm(width, config.norm_epsilon, rngs=rngs)
        self.predict = Linear(width, config.target_dim, dtype=dtype, rngs=rngs)
        self.basis = TARGETS.find(config.target_name)(config)  # the target; checkpoints use this name

    def __call__(
        self,
        tokens: jax.Array,
        grid: tuple[int, int],
        ids_restore: jax.Array,
        record: tuple[bool, bool] = (False, False),
        ids: jax.Array | None = None,
        count: jax.Array | None = None,
    ) -> tuple[jax.Array, Recorded]:
        """Tokens [B, C + K, D] to float32 [B, L, target_dim], or with `ids` [B, P] (if cross) to [B, P, target_dim].

        `count` [B]: only the first so many of the K patches are visible.
        """
        config, memory, first = self.config, None, self.config.class_tokens
        table = position_table(self.positions, config.grid, grid, config.decoder_width)
        if self.embed is None:
            memory, first = tokens, 0
            count = None if count is None else count + config.class_tokens
            x = self.mask_token[...] + (table[None, 1:] if ids is None else take_patches(table[1:], ids))
            x = jnp.broadcast_to(x, (len(tokens), *x.shape[1:]))
        else:
            x, count = self._all_tokens(tokens, table, ids_restore, count), None
        x, recorded = scan_blocks(self.blocks, x, memory=memory, count=count, record=record)
        return self.predict(self.norm(x[:, first:])).astype(jnp.float32), recorded

    def _all_tokens(
        self, tokens: jax.Array, table: jax.Array, ids_restore: jax.Array, count: jax.Array | None
    ) -> jax.Array:
        x, classes = self.embed(tokens), self.config.class_tokens
        b, n, d = x.shape
        if not self.config.encoder_mask_tokens:
            hidden = jnp.broadcast_to(self.mask_token[...], (b, ids_restore.shape[1] + classes - n, d))
            patches = jnp.concatenate([x[:, classes:], hidden], axis=1)
            if count is not None:
                seen = jnp.arange(patches.shape[1])[:, None] < count[:, None, None]
                patches = jnp.where(seen, patches, self.mask_token[...]).astype(x.dtype)
            patches = take_patches(patches, ids_restore)
            x = jnp.concatenate([x[:, :classes], patches], axis=1)
        if classes > 1:
            table = jnp.concatenate([jnp.repeat(table[:1], classes, axis=0), table[1:]])
        return x + table
