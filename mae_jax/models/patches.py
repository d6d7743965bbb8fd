"""Images to sequences of patches and back."""

import jax
from einops import rearrange

from mae_jax.runtime.errors import UserError


def grid_size(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of (height, width) pixels.

    Raises:
      UserError: if the patch size does not divide the height and the width.
    """
    height, width = image_size
    if patch_size < 1 or height < 1 or width < 1 or height % patch_size or width % patch_size:
        raise UserError(
            f"patch size {patch_size} does not divide the image size {height} x {width}; "
            "choose model.image_size and model.patch_size so that it divides both sides"
        )
    return height // patch_size, width // patch_size


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """Cuts images [B, H, W, C] into patches [B, L, p*p*C].

    Patches stand in row-major order; inside a patch the order is (row, column, channel), channel fastest.
    """
    return rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: jax.Array, patch_size: int, grid: tuple[int, int]) -> jax.Array:
    """Puts patches [B, L, p*p*C] of a (rows, columns) grid together to images [B, H, W, C]; inverts `patchify`."""
    h, w = grid
    return rearrange(patches, "b (h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=patch_size, q=patch_size)
