"""Settings: their mistakes found early, and configs as plain dicts."""

import difflib
import math
import os
from collections.abc import Iterable
from typing import Any

import ml_collections

from mae_jax.errors import UserError
from mae_jax.models.classifier import POOLS
from mae_jax.models.mae_config import MAEConfig
from mae_jax.stages import check_resolutions

# Least values of numeric settings; those that are None are not checked.
AT_LEAST = {
    "data.batch_size": 1,
    "data.num_threads": 1,
    "data.num_workers": 0,
    "data.prefetch_batches": 1,
    "data.num_examples": 4,
    "data.max_pixels": 1,
    "data.rand_augment_ops": 1,
    "data.rand_augment_magnitude_std": 0,
    "data.mixup": 0,
    "data.cutmix": 0,
    "classifier.num_classes": 2,
    "classifier.head_std": 0,
    "train.steps": 1,
    "train.log_every_steps": 1,
    "train.accumulate_steps": 1,
    "train.skip_nonfinite": 0,
    "train.profile_steps": 0,
    "optimizer.base_learning_rate": 0,
    "optimizer.min_learning_rate": 0,
    "optimizer.warmup_epochs": 0,
    "optimizer.weight_decay": 0,
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_every_steps": 1,
    "evaluate.every_steps": 1,
    "evaluate.batch_size": 1,
    "evaluate.max_train_examples": 1,
    "evaluate.max_examples": 1,
    "evaluate.knn_k": 1,
    "evaluate.pictures": 1,
}
ABOVE_ZERO = (
    "train.epochs",
    "optimizer.epsilon",
    "optimizer.trust_coefficient",
    "optimizer.clip_norm",
    "evaluate.knn_temperature",
    "evaluate.probe_c",
)
CHOICES = {
    "classifier.pool": tuple(POOLS),
    "data.augmentation": ("none", "rand_augment"),
    "data.crop_rule": ("retry", "clip", "centre"),
    "data.resize": ("pillow", "opencv"),
    "data.on_bad_image": ("replace", "raise"),
    "evaluate.token": ("mean", "class"),
    "optimizer.name": ("adamw", "lars", "muon"),
}
# [low, high] of settings that are shares or probabilities; those that are None are not checked.
WITHIN = {
    "data.color_jitter": (0, 1),
    "data.rand_augment_magnitude": (0, 10),
    "data.erasing": (0, 1),
    "data.mix_probability": (0, 1),
    "data.mix_switch_probability": (0, 1),
    "optimizer.layer_decay": (0, 1),
}
# The same for [low, high).
BELOW = {
    "classifier.drop_path": (0, 1),
    "classifier.label_smoothing": (0, 1),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.momentum": (0, 1),
    "optimizer.muon_momentum": (0, 1),
    "train.ema_decay": (0, 1),
}


def check(config: ml_collections.ConfigDict) -> None:
    """Checks every value that can be judged without looking at data or devices.

    Raises:
      UserError: names the setting, its value and what it must be.
    """
    for key, value in flatten(config.to_dict()).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{key}={value} must be finite")
    for key in ("data.crop_scale", "data.crop_ratio", "data.mean", "data.std"):
        value = get(config, key)
        if not value or not all(isinstance(number, int | float) for number in value):
            raise UserError(f"{key}={tuple(value)} must be numbers, for example --config.{key}='(0.5, 1.0)'")
        if "crop" in key and len(value) != 2:
            raise UserError(f"{key}={tuple(value)} must be two numbers, (low, high)")
    for key in ("seed", "data.seed"):
        if not 0 <= get(config, key) < 2**32:
            raise UserError(f"{key}={get(config, key)} is outside [0, 2^32)")
    for key, least in AT_LEAST.items():
        value = get(config, key)
        if value is not None and not value >= least:
            raise UserError(f"{key}={value} must be at least {least}")
    for key in ABOVE_ZERO:
        value = get(config, key)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value} must be above 0")
    for key, choices in CHOICES.items():
        if get(config, key) not in choices:
            value = get(config, key)
            raise UserError(f"{key}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}")
    for key, (low, high) in WITHIN.items():
        if not low <= get(config, key) <= high:
            raise UserError(f"{key}={get(config, key)} is outside [{low}, {high}]")
    for key, (low, high) in BELOW.items():
        value = get(config, key)
        if value is not None and not low <= value < high:
            raise UserError(f"{key}={value} is outside [{low}, {high})")
    if config.data.label_fraction is not None and not 0 < config.data.label_fraction <= 1:
        raise UserError(f"data.label_fraction={config.data.label_fraction} is outside (0, 1]")
    if config.shard is not None and config.task != "ablate":
        raise UserError(f"shard={config.shard} is for ablations (configs/ablations/): one run has no parts to share")
    if config.evaluate.mask and config.evaluate.mask_ratio is not None:
        raise UserError(
            f"evaluate.mask_ratio={config.evaluate.mask_ratio} beside evaluate.mask={config.evaluate.mask}, which "
            "decides what is hidden: leave one of them out"
        )
    _check_sweeps(config.evaluate)
    _check_classifier(config)
    data = config.data
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"data.crop_scale={tuple(data.crop_scale)} must be (low, high) with 0 < low <= high <= 1")
    low, high = data.crop_ratio
    if not 0 < low <= high:
        raise UserError(f"data.crop_ratio={tuple(data.crop_ratio)} must be (low, high) with 0 < low <= high")
    if not 0 < data.eval_crop <= 1:
        raise UserError(f"data.eval_crop={data.eval_crop} is outside (0, 1]")
    if not 0 < data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction={data.eval_fraction} is outside (0, 1)")
    check_resolutions(config.train.resolutions)
    if config.task != "pretrain" and config.init_from:
        return  # the model is the checkpoint's, and is judged when that is read
    model = MAEConfig(**config.model)
    if config.evaluate.mask_ratio is not None:
        model.num_visible(config.evaluate.mask_ratio, name="evaluate.mask_ratio")
    check_channels(data, model.channels)
    check_resolutions(config.train.resolutions, model)


def check_channels(data: ml_collections.ConfigDict, channels: int) -> None:
    """Raises UserError unless the settings of `data` fit pictures with this many channels."""
    for key in ("mean", "std"):
        values = data[key]
        if len(values) not in (1, channels):
            raise UserError(
                f"data.{key} has {len(values)} values for model.channels={channels}; "
                f"give one value, or one for each channel, for example --config.data.{key}='(0.5,)'"
            )
        if key == "std" and not min(values) > 0:
            raise UserError(f"data.std={tuple(values)} must be above 0")
    if data.augmentation == "rand_augment" and channels not in (1, 3):
        raise UserError(
            f"data.augmentation=rand_augment takes pictures of 1 or 3 channels, not model.channels={channels}; "
            "set data.augmentation=none"
        )


def _check_sweeps(evaluate: ml_collections.ConfigDict) -> None:
    for name, above in (("knn_sweep_k", 1), ("knn_sweep_temperature", 0), ("probe_sweep_c", 0)):
        values = tuple(evaluate[name])
        kinds = int if name == "knn_sweep_k" else int | float
        numbers = values and all(isinstance(value, kinds) for value in values)
        if not numbers or not (min(values) >= above if name == "knn_sweep_k" else min(values) > above):
            kind = "whole numbers of at least 1" if above else "numbers above 0"
            raise UserError(f"evaluate.{name}={values} must be {kind}, for example --config.evaluate.{name}='(1, 10)'")


def _check_classifier(config: ml_collections.ConfigDict) -> None:
    """What the settings of classify must be together."""
    if config.task in ("pretrain", "classify") and config.data.name is None:
        raise UserError("data.name is not set: which pictures? For example --config.data.name=image_folder")
    if config.task == "pretrain" and config.model.uniformity and config.train.accumulate_steps > 1:
        raise UserError(
            f"model.uniformity={config.model.uniformity} compares the images of a whole batch: set "
            f"train.accumulate_steps=1, not {config.train.accumulate_steps}"
        )
    if config.task == "pretrain" and config.optimizer.name == "lars":
        raise UserError("optimizer.name=lars is for probes of a frozen encoder; set optimizer.name=adamw")
    if config.task != "classify":
        return
    trained, depth = config.classifier.trained_blocks, config.model.depth
    if trained is not None and trained != 0.5 and not (trained >= 0 and trained == int(trained)):
        raise UserError(f"classifier.trained_blocks={trained} is none of 0, 0.5, 1, 2, ..., {depth}")
    if config.optimizer.name == "lars" and trained != 0:
        raise UserError(
            "optimizer.name=lars is for probes (its trust ratio would mix the blocks): "
            "set classifier.trained_blocks=0 or optimizer.name=adamw"
        )
    if config.optimizer.name == "muon" and trained == 0:
        raise UserError(
            "optimizer.name=muon is for the matrices of the blocks, of which classifier.trained_blocks=0 trains none: "
            "set optimizer.name=adamw or lars"
        )


def expand_paths(config: ml_collections.ConfigDict) -> None:
    """Replaces a leading ~ of the paths among the settings, which shells leave alone in `--config.KEY=~/...`."""
    config.init_from = config.init_from and os.path.expanduser(config.init_from)
    config.data.path = config.data.path and os.path.expanduser(config.data.path)
    config.evaluate.mask = config.evaluate.mask and os.path.expanduser(config.evaluate.mask)


def get(config: Any, key: str) -> Any:
    """The value of a dotted key such as `train.steps`."""
    for part in key.split("."):
        config = config[part]
    return config


def flatten(config: dict, prefix: str = "") -> dict[str, Any]:
    """{"train": {"steps": 1}} -> {"train.steps": 1}; tuples become lists, as JSON has them."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _swap(value, tuple, list)
    return flat


def from_dict(values: dict) -> dict:
    """Undoes what JSON does to a config: lists become tuples again."""
    return {
        key: from_dict(value) if isinstance(value, dict) else _swap(value, list, tuple) for key, value in values.items()
    }


def _swap(value: Any, old: type, new: type) -> Any:
    """Makes sequences of one type, at any depth, those of another."""
    return new(_swap(item, old, new) for item in value) if isinstance(value, old) else value


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint such as `; did you mean "digits"?`, or nothing if no word is near."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""
