"""Settings: their mistakes found early, and configs as plain dicts."""

import functools
import math
import os
from typing import Any

import ml_collections
from ml_collections.config_dict import FieldReference

from mae_jax.data.resolutions import check_resolutions
from mae_jax.models.classifier import POOLS
from mae_jax.models.config import MAEConfig
from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import INT32_MAX, defaults, flatten, get
from mae_jax.settings.suggestions import nearest

FLOAT32_MAX = 3.4e38  # what numbers of a run are kept in
# [low, high] of numeric settings; a high of None is no limit. Above these limits a run would not start, or never end.
# Settings that are None are not checked.
WITHIN = {
    "data.batch_size": (1, None),
    "data.num_threads": (1, None),
    "data.num_workers": (0, 256),
    "data.prefetch_batches": (1, 256),
    "data.num_examples": (4, 10_000_000),
    "data.max_pixels": (1, 178_956_970),
    "data.eval_crop": (0.01, 1),
    "data.color_jitter": (0, 1),
    "data.rand_augment_ops": (1, 100),
    "data.rand_augment_magnitude": (0, 10),
    "data.rand_augment_magnitude_std": (0, None),
    "data.erasing": (0, 1),
    "data.mixup": (0, 1000),
    "data.cutmix": (0, 1000),
    "data.mix_probability": (0, 1),
    "data.mix_switch_probability": (0, 1),
    "classifier.num_classes": (2, 1_000_000),
    "classifier.head_std": (0, 1000),
    "train.steps": (1, None),
    "train.log_every_steps": (1, None),
    "train.accumulate_steps": (1, None),
    "train.skip_nonfinite": (0, None),
    "train.profile_steps": (0, 1000),
    "optimizer.base_learning_rate": (0, None),
    "optimizer.min_learning_rate": (0, None),
    "optimizer.warmup_epochs": (0, None),
    "optimizer.weight_decay": (0, None),
    "optimizer.layer_decay": (0, 1),
    "checkpoint.every_steps": (1, None),
    "checkpoint.keep": (1, None),
    "checkpoint.keep_every_steps": (1, None),
    "evaluate.every_steps": (1, None),
    "evaluate.batch_size": (1, None),
    "evaluate.max_train_examples": (1, None),
    "evaluate.max_examples": (1, None),
    "evaluate.knn_k": (1, 10_000),
    "evaluate.knn_temperature": (1e-10, 1e10),
    "evaluate.probe_c": (1e-10, 1e10),
    "evaluate.pictures": (1, 1000),
}
ABOVE_ZERO = ("train.epochs", "optimizer.epsilon", "optimizer.trust_coefficient", "optimizer.clip_norm")
CHOICES = {
    "classifier.pool": tuple(POOLS),
    "data.augmentation": ("none", "rand_augment"),
    "data.crop_rule": ("retry", "clip", "centre"),
    "data.on_bad_image": ("replace", "raise"),
    "evaluate.token": ("mean", "class"),
    "optimizer.name": ("adamw", "lars", "muon"),
}
# [low, high) of others.
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
        _check_kind(key, value)
    for key in ("data.crop_scale", "data.crop_ratio", "data.mean", "data.std"):
        value = get(config, key)
        if not value or not all(isinstance(number, int | float) for number in value):
            raise UserError(f"{key}={tuple(value)} must be numbers, for example --config.{key}='(0.5, 1.0)'")
        if key in ("data.mean", "data.std") and not all(0 <= number <= 1 for number in value):
            raise UserError(f"{key}={tuple(value)} must lie within [0, 1], as the values of pictures do")
        if "crop" in key and len(value) != 2:
            raise UserError(f"{key}={tuple(value)} must be two numbers, (low, high)")
    for key in ("seed", "data.seed"):
        if not 0 <= get(config, key) < 2**32:
            raise UserError(f"{key}={get(config, key)} is outside [0, 2^32)")
    for key, (low, high) in WITHIN.items():
        value = get(config, key)
        if value is not None and value < low:
            raise UserError(f"{key}={value} must be at least {low}")
        if value is not None and high is not None and value > high:
            raise UserError(f"{key}={value} must be at most {high:,}")
    for key in ABOVE_ZERO:
        value = get(config, key)
        if value is not None and not value > 0:
            raise UserError(f"{key}={value} must be above 0")
    for key, choices in CHOICES.items():
        if get(config, key) not in choices:
            value = get(config, key)
            raise UserError(f"{key}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}")
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
    _check_together(config)
    data = config.data
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise UserError(f"data.crop_scale={tuple(data.crop_scale)} must be (low, high) with 0 < low <= high <= 1")
    low, high = data.crop_ratio
    if not 0 < low <= high:
        raise UserError(f"data.crop_ratio={tuple(data.crop_ratio)} must be (low, high) with 0 < low <= high")
    if not 0 < data.eval_fraction <= 1:
        raise UserError(f"data.eval_fraction={data.eval_fraction} is outside (0, 1]")
    check_value_range(data.value_range)
    check_resolutions(config.train.resolutions)
    if config.task != "pretrain" and config.init_from:
        return  # the model is the checkpoint's, and is judged when that is read
    model = MAEConfig(**config.model)
    if config.evaluate.mask_ratio is not None:
        model.num_visible(config.evaluate.mask_ratio, name="evaluate.mask_ratio")
    check_channels(data, model.channels)
    check_resolutions(config.train.resolutions, model)


@functools.cache
def _may_be_none() -> set[str]:
    """The settings that configs/common.py makes as a FieldReference (or placeholder)."""
    config = defaults()
    groups = {f"{name}.": group for name, group in config.items() if isinstance(group, ml_collections.ConfigDict)}
    return {
        prefix + name
        for prefix, group in ({"": config} | groups).items()
        for name, field in group.items(preserve_field_references=True)
        if isinstance(field, FieldReference)
    }


def _check_kind(key: str, value: Any) -> None:
    """Raises UserError for None where a value is needed, and for numbers beyond 32 bits."""
    if value is None and key not in _may_be_none():
        raise UserError(f"{key}=None: this setting needs a value")
    if key.startswith("ablate."):  # the settings of its cells are checked
        return
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{key}={value} must be finite")
        if isinstance(number, int) and abs(number) > INT32_MAX and not key.endswith(("seed", "value_range")):
            raise UserError(f"{key}={value} must be at most {INT32_MAX:,}")
        if isinstance(number, int | float) and abs(number) > FLOAT32_MAX and not key.endswith("seed"):
            raise UserError(f"{key}={value} must lie within {FLOAT32_MAX}, the range of float32")


def check_value_range(value: Any) -> None:
    """Raises UserError unless a value can be `data.value_range`."""
    numbers = isinstance(value, list | tuple) and all(type(number) in (int, float) for number in value)
    if value is not None and not (numbers and len(value) == 2 and value[0] < value[1]):
        raise UserError(
            f"data.value_range={value!r} must be two numbers, (low, high) with low < high, for example "
            "--config.data.value_range='(0, 4095)'"
        )


def check_channels(data: ml_collections.ConfigDict, channels: int) -> None:
    """Raises UserError unless the settings of `data` fit pictures with this many channels."""
    for key in ("mean", "std"):
        values = data[key]
        if len(values) not in (1, channels):
            raise UserError(
                f"data.{key} has {len(values)} values for model.channels={channels}; "
                f"give one value, or one for each channel, for example --config.data.{key}='(0.5,)'"
            )
        if key == "std" and not min(values) > 1e-6:
            raise UserError(f"data.std={tuple(values)} must be above 1e-6")
    if data.augmentation == "rand_augment" and channels not in (1, 3):
        raise UserError(
            f"data.augmentation=rand_augment takes pictures of 1 or 3 channels, not model.channels={channels}; "
            "set data.augmentation=none"
        )


def _check_sweeps(evaluate: ml_collections.ConfigDict) -> None:
    for name, kinds, low, high in (
        ("knn_sweep_k", int, *WITHIN["evaluate.knn_k"]),
        ("knn_sweep_temperature", int | float, *WITHIN["evaluate.knn_temperature"]),
        ("probe_sweep_c", int | float, *WITHIN["evaluate.probe_c"]),
    ):
        values = tuple(evaluate[name])
        if not values or not all(isinstance(value, kinds) and low <= value <= high for value in values):
            kind = "whole numbers" if kinds is int else "numbers"
            raise UserError(
                f"evaluate.{name}={values} must be {kind} from {low} to {high:,}, for example "
                f"--config.evaluate.{name}='(1, 10)'"
            )


def _check_together(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for settings that contradict one another."""
    if config.data.name is None and config.task == "classify" and not config.init_from:
        raise UserError(
            "init_from is not set, nor is data.name: which encoder, and which pictures? Give a checkpoint, for example "
            "--config.init_from=runs/digits"
        )
    if config.data.name is None and config.task == "pretrain":
        raise UserError("data.name is not set: which pictures? For example --config.data.name=image_folder")
    if config.train.accumulate_steps > (config.data.batch_size or INT32_MAX):
        raise UserError(
            f"train.accumulate_steps={config.train.accumulate_steps} is more than data.batch_size="
            f"{config.data.batch_size}: a part has at least one picture"
        )
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
