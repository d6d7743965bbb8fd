"""Masked autoencoders in JAX and Flax.

`load` gives a trained model, from our own runs or from files of other programs; `Processor` makes images of pictures.
"""

from mae_jax.data.processor import Processor
from mae_jax.interop.weights import load
from mae_jax.models.mae import MAEConfig, MaskedAutoencoder
from mae_jax.models.patches import patchify, unpatchify

__all__ = ["MAEConfig", "MaskedAutoencoder", "Processor", "load", "patchify", "unpatchify"]
