"""Augmentation of a classifier's batches on the device, as the settings `data.*` say."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mae_jax.data.augment import color_jitter, normalize, random_erasing, random_flip
from mae_jax.data.mixing import mix


def augment(
    data_config: ConfigDict, keys: jax.Array, images: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augments uint8 images [B, H, W, C] and targets [B, K] by keys [B]; images become float32, normalised."""
    flip_keys, color_keys, erase_keys, mix_keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 4))(keys), 1, 0)
    images = random_flip(flip_keys, images) if data_config.flip else images
    images = color_jitter(color_keys, images, data_config.color_jitter) if data_config.color_jitter else images
    images = normalize(images, data_config.mean, data_config.std)
    images = random_erasing(erase_keys, images, data_config.erasing) if data_config.erasing else images
    return mix(
        mix_keys, images, targets,
        mixup=data_config.mixup, cutmix=data_config.cutmix,
        probability=data_config.mix_probability, switch_probability=data_config.mix_switch_probability,
    )  # fmt: skip


def augmentations(data_config: ConfigDict, *, of_classifier: bool) -> list[str]:
    """Names of the random changes to a training picture, on the host or the device; empty: it is always the same."""
    names = [f"random crop {data_config.crop_scale}"] if data_config.crop_rule != "centre" else []
    names += ["flip"] if data_config.flip else []
    names += ["RandAugment"] if data_config.augmentation == "rand_augment" else []
    for name in ("color_jitter", "erasing", "mixup", "cutmix") if of_classifier else ("color_jitter",):
        names += [f"{name} {data_config[name]}"] if data_config[name] else []
    return names
