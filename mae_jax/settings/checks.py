"""Checks of the settings' values, before any data are read or code is compiled."""

import functools
import math
import os
from typing import Any

import ml_collections
from ml_collections.config_dict import FieldReference

from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import INT32_MAX, defaults, flatten, get
from mae_jax.settings.suggestions import nearest

FLOAT32_MAX = 3.4e38  # runs compute in float32
# Interval -> settings whose number, or each of whose numbers, must lie in it; None is not checked. Beyond the upper
# limits a run would not start, or would never end.
RANGES = {
    "[1, inf)": "data.batch_size data.num_threads train.steps train.log_every_steps train.accumulate_steps "
    "checkpoint.every_steps checkpoint.keep checkpoint.keep_every_steps evaluate.every_steps evaluate.batch_size "
    "evaluate.max_train_examples evaluate.max_examples",
    "[0, inf)": "data.rand_augment_magnitude_std train.skip_nonfinite optimizer.base_learning_rate "
    "optimizer.min_learning_rate optimizer.warmup_epochs optimizer.weight_decay",
    "(0, inf)": "data.crop_ratio train.epochs optimizer.epsilon optimizer.trust_coefficient optimizer.clip_norm",
    "[0, 1]": "data.mean data.std data.color_jitter data.erasing data.mix_probability data.mix_switch_probability "
    "optimizer.layer_decay",
    "(0, 1]": "data.crop_scale data.label_fraction data.eval_fraction optimizer.decay_fraction",
    "[0, 1)": "classifier.drop_path classifier.label_smoothing optimizer.b1 optimizer.b2 optimizer.momentum "
    "optimizer.muon_momentum train.ema_decay",
    "[0.01, 1]": "data.eval_crop",
    "[0, 10]": "data.rand_augment_magnitude",
    "[1, 100]": "data.rand_augment_ops",
    "[0, 256]": "data.num_workers",
    "[1, 256]": "data.prefetch_batches",
    "[0, 1000]": "data.mixup data.cutmix classifier.head_std train.profile_steps",
    "[1, 1000]": "evaluate.pictures",
    "[1, 10000]": "evaluate.knn_k evaluate.knn_sweep_k",
    "[2, 1000000]": "classifier.num_classes",
    "[4, 10000000]": "data.num_examples",
    "[1, 178956970]": "data.max_pixels",
    "[1e-10, 1e10]": "evaluate.knn_temperature evaluate.knn_sweep_temperature evaluate.probe_c evaluate.probe_sweep_c",
    "[0, 4294967295]": "seed data.seed",
}
INTERVALS = {key: interval for interval, keys in RANGES.items() for key in keys.split()}
CHOICES = {
    "data.augmentation": ("none", "rand_augment"),
    "data.crop_rule": ("retry", "clip", "centre"),
    "data.on_bad_image": ("replace", "raise"),
    "evaluate.token": ("mean", "class"),
}
PATHS = ("init_from", "data.path", "evaluate.mask")


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for any value that is wrong whatever the data and devices are."""
    for key, value in flatten(config.to_dict()).items():
        _check_kind(key, value)
        if value is not None and key in INTERVALS:
            _check_range(key, value, INTERVALS[key])
        if key in CHOICES and value not in CHOICES[key]:
            choices = CHOICES[key]
            raise UserError(f"{key}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}")
    for name in ("crop_scale", "crop_ratio"):
        value = config.data[name]
        if len(value) != 2 or value[0] > value[1]:
            raise UserError(f"data.{name}={tuple(value)} must be two numbers, (low, high) with low <= high")
    if config.evaluate.mask and config.evaluate.mask_ratio is not None:
        raise UserError(
            f"evaluate.mask_ratio={config.evaluate.mask_ratio} cannot be given with evaluate.mask="
            f"{config.evaluate.mask}, which decides what is hidden: leave one of them out"
        )
    check_value_range(config.data.value_range)


@functools.cache
def _may_be_none() -> set[str]:
    """The settings that configs/common.py defines by `placeholder` or FieldReference."""
    fields = flatten(defaults().to_dict(preserve_field_references=True))
    return {key for key, field in fields.items() if isinstance(field, FieldReference)}


def _check_kind(key: str, value: Any) -> None:
    """Raises UserError for None where a value is needed, and for numbers beyond 32 bits."""
    if value is None and key not in _may_be_none():
        raise UserError(f"{key}=None: this setting needs a value")
    if key.startswith("ablate."):  # the settings of each cell are checked instead
        return
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{key}={value} must be finite")
        if isinstance(number, int) and abs(number) > INT32_MAX and not key.endswith(("seed", "value_range")):
            raise UserError(f"{key}={value} must be at most {INT32_MAX:,}")
        if isinstance(number, int | float) and abs(number) > FLOAT32_MAX and not key.endswith("seed"):
            raise UserError(f"{key}={value} must lie within {FLOAT32_MAX}, the range of float32")


def _check_range(key: str, value: Any, interval: str) -> None:
    """Raises UserError unless a number, or each of a tuple, is in an interval such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))
    kinds = int if key == "evaluate.knn_sweep_k" else int | float

    def inside(number: Any) -> bool:
        at_limit = interval[0] == "(" and number == low or interval[-1] == ")" and number == high
        return isinstance(number, kinds) and low <= number <= high and not at_limit

    if not isinstance(value, list):
        if not inside(value):
            raise UserError(f"{key}={value} is outside {interval}")
    elif not value or not all(map(inside, value)):
        kind = "whole numbers" if kinds is int else "numbers"
        example = flatten(defaults().to_dict())[key]
        raise UserError(
            f"{key}={tuple(value)} must be {kind} in {interval}, for example --config.{key}='{tuple(example)}'"
        )


def check_value_range(value: Any) -> None:
    """Raises UserError unless a value is valid as `data.value_range`."""
    numbers = isinstance(value, list | tuple) and all(type(number) in (int, float) for number in value)
    if value is not None and not (numbers and len(value) == 2 and value[0] < value[1]):
        raise UserError(
            f"data.value_range={value!r} must be two numbers, (low, high) with low < high, for example "
            "--config.data.value_range='(0, 4095)'"
        )


def check_channels(data: ml_collections.ConfigDict, channels: int) -> None:
    """Raises UserError unless the settings `data` fit pictures with this many channels."""
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


def expand_paths(config: ml_collections.ConfigDict) -> None:
    """Expands a leading ~ in settings that are paths: shells do not, in `--config.KEY=~/...`."""
    for key in PATHS:
        if path := get(config, key):
            config.update_from_flattened_dict({key: os.path.expanduser(path)})
