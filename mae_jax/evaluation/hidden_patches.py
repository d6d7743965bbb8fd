"""Which patches an evaluation hides: drawn for each image, or given by the user."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mae_jax.models.config import MAEConfig
from mae_jax.models.masking import check_given_mask, given_masks
from mae_jax.runtime.errors import UserError, first_line
from mae_jax.runtime.seeds import make_key


class HiddenPatches:
    """The masks of `count` evaluation images: those of `evaluate.mask`, or drawn from the seed and the image's index.

    Raises:
      UserError: for a mask ratio or given masks that do not fit.
    """

    def __init__(self, config: ConfigDict, model: MAEConfig, count: int):
        settings = config.evaluate
        self._model, self._key, self._given = model, make_key(config.seed, "evaluate"), None
        self._ratio = model.mask_ratio if settings.mask_ratio is None else settings.mask_ratio
        if settings.mask:
            self._given, self._visible = read_masks(settings.mask, count, model.grid)
        else:
            self._visible = model.num_visible(self._ratio, name="evaluate.mask_ratio")

    def apply(self, model, images: jax.Array, index: jax.Array, number: jax.Array):
        """The output of an autoencoder for images [B, H, W, C].

        Args:
          index: [B], which random masks are drawn from.
          number: [B], the images' places in the evaluation data, by which masks are given.
        """
        if self._given is not None:
            return model(images, mask=given_masks(jnp.asarray(self._given)[number], self._visible))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self._key, index)
        return model(images, key=keys, mask_ratio=self._ratio)

    @property
    def description(self) -> str:
        """Such as "75% of the patches hidden"."""
        share = self._ratio if self._given is None else 1 - self._visible / self._model.num_patches
        return f"{share:.0%} of the patches hidden{', as given' if self._given is not None else ''}"

    @property
    def counted(self) -> str:
        """Which patches the loss is the mean of: all of them, also where none is hidden."""
        all_count = self._model.loss_patches == "all" or self._visible == self._model.num_patches
        return "all" if all_count else "the hidden"


def read_masks(given: str, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, int]:
    """The masks of `evaluate.mask` for `count` images: bool [count, L], True = hidden, and how many are visible.

    Args:
      given: FILE.npy, or FILE.py:FUNCTION; see `check_given_mask` for what they hold.

    Raises:
      UserError: if there is no such file or function, it fails, or its masks do not fit.
    """
    path, _, name = given.rpartition(":") if ".py:" in given else (given, "", "")
    try:
        mask = runpy.run_path(path)[name] if name else np.load(path, allow_pickle=False)
        return check_given_mask(mask, count, grid)
    except UserError as error:
        raise UserError(f"evaluate.mask={given}: {error}") from error
    except Exception as error:  # of a file that is no mask, or of the user's own code
        why = first_line(error) if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"evaluate.mask={given} cannot be used ({why}); give FILE.npy, or FILE.py:FUNCTION of a working function"
        ) from error
