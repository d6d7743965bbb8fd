"""Images to sequences of patches and back."""

import jax
from einops import rearrange

from mae_jax.runtime.errors import UserError


def grid_size(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches in a (height, width) image; UserError unless the patch size divides both sides."""
    height, width = image_size
    if patch_size < 1 or height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise UserError(
            f"patch size {patch_size} does not divide the image size {height} x {width}; "
            "choose model.image_size and model.patch_size so that it divides both sides"
        )
    return height // patch_size, width // patch_size


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into patches [B, L, p*p*C], row by row, with values in order (row, column, channel)."""
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: jax.Array, patch_size: int, grid: tuple[int, int]) -> jax.Array:
    """Inverts `patchify`: patches [B, L, p*p*C] of a (rows, columns) grid to images [B, H, W, C]."""
    h, w = grid
    return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=patch_size, q=patch_size)
