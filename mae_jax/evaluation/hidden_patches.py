"""The patches that an evaluation hides: drawn at random or given by the user."""

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
    """Masks of `count` images: from `evaluate.mask`, or drawn from seed and index. UserError for unusable ones."""

    def __init__(self, config: ConfigDict, model: MAEConfig, count: int):
        settings = config.evaluate
        self._model, self._key, self._given = model, make_key(config.seed, "evaluate"), None
        self._ratio = model.mask_ratio if settings.mask_ratio is None else settings.mask_ratio
        if settings.mask:
            self._given, self._visible = read_masks(settings.mask, count, model.grid)
        else:
            self._visible = model.num_visible(self._ratio, name="evaluate.mask_ratio")

    def apply(self, model, images: jax.Array, index: jax.Array, number: jax.Array):
        """Output for images [B, H, W, C]: index [B] seeds random masks, number [B] picks given ones."""
        if self._given is not None:
            return model(images, mask=given_masks(jnp.asarray(self._given)[number], self._visible))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self._key, index)
        return model(images, key=keys, mask_ratio=self._ratio)

    @property
    def description(self) -> str:
        """For example "75% of the patches hidden"."""
        share = self._ratio if self._given is None else 1 - self._visible / self._model.num_patches
        return f"{share:.0%} of the patches hidden{', as given' if self._given is not None else ''}"

    @property
    def counted(self) -> str:
        """The patches that the loss averages over; all of them if none is hidden."""
        all_count = self._model.loss_patches == "all" or self._visible == self._model.num_patches
        return "all" if all_count else "the hidden"


def read_masks(given: str, count: int, grid: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Masks bool [count, L] (True = hidden) from FILE.npy or FILE.py:FUNCTION, and the visible count; or UserError."""
    path, _, name = given.rpartition(":") if ".py:" in given else (given, "", "")
    try:
        mask = runpy.run_path(path)[name] if name else np.load(path, allow_pickle=False)
        return check_given_mask(mask, count, grid)
    except UserError as error:
        raise UserError(f"evaluate.mask={given}: {error}") from error
    except Exception as error:  # the file holds no mask, or the user's code failed
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"evaluate.mask={given} cannot be used ({why}); give FILE.npy or FILE.py:FUNCTION") from error
