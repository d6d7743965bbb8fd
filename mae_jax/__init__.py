"""Masked autoencoders in JAX and Flax.

`load` gives a trained model, from a workdir or from files of other programs; `Processor` prepares pictures for it.
"""

from mae_jax.data.processor import Processor
from mae_jax.interop.weights import load
from mae_jax.models.mae import MAEConfig, MaskedAutoencoder
from mae_jax.models.patches import patchify, unpatchify

__version__ = "0.1.0"
__all__ = ["MAEConfig", "MaskedAutoencoder", "Processor", "load", "patchify", "unpatchify"]
