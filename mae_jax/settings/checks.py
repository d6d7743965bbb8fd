"""Checks of the settings' values, and that all processes have the same, before any data are read."""

import functools
import os
import secrets
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict, FieldReference

from mae_jax.runtime.errors import UserError
from mae_jax.runtime.processes import from_main, is_main, process_count, wait_for_all
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
LOCAL = ("data.path", "data.num_threads", "data.num_workers", "data.prefetch_batches", "given")  # of each process
SEEN_SECONDS = 10  # for a file to appear on other hosts: network file systems cache


def check(config: ConfigDict) -> None:
    """Raises UserError for any value that is wrong whatever the data and devices are."""
    for key, value in flatten(config.to_dict()).items():
        if value is None and key not in _may_be_none():
            raise UserError(f"{key}=None: this setting needs a value")
        # Of an ablation, the settings of each cell are checked instead.
        if value is not None and not key.startswith(("ablate.", "data.value_range")):
            _check_numbers(key, value)
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


def _check_numbers(key: str, value: Any) -> None:
    """Raises UserError unless a number, or each of a list, is in the setting's interval and fits into 32 bits."""
    interval, kinds = INTERVALS.get(key, "(-inf, inf)"), int if key == "evaluate.knn_sweep_k" else int | float
    numbers = value if isinstance(value, list) else [value]
    if key not in INTERVALS:
        numbers = [number for number in numbers if isinstance(number, kinds)]
    whole = all(isinstance(number, int) for number in numbers) and not key.endswith("seed")
    limit = INT32_MAX if whole else FLOAT32_MAX
    low, high = (min(max(float(end), -limit), limit) for end in interval[1:-1].split(","))

    def inside(number: Any) -> bool:
        at_limit = interval[0] == "(" and number == low or interval[-1] == ")" and number == high
        return isinstance(number, kinds) and low <= number <= high and not at_limit

    if not all(map(inside, numbers)) or key in INTERVALS and not numbers:
        limits = f"{interval[0]}{low:.10g}, {high:.10g}{interval[-1]}"
        if not isinstance(value, list):
            raise UserError(f"{key}={value} is outside {limits}")
        kind, example = "whole numbers" if kinds is int else "numbers", flatten(defaults().to_dict())[key]
        raise UserError(
            f"{key}={tuple(value)} must be {kind} in {limits}, for example --config.{key}='{tuple(example)}'"
        )


def check_value_range(value: Any) -> None:
    """Raises UserError unless a value is valid as `data.value_range`."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) < FLOAT32_MAX

    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(is_number, value))
    if value is not None and not (pair and value[0] < value[1]):
        raise UserError(
            f"data.value_range={value!r} must be two numbers, (low, high) with low < high, for example "
            "--config.data.value_range='(0, 4095)'"
        )


def check_channels(data: ConfigDict, channels: int) -> None:
    """Raises UserError unless the settings `data` fit pictures with this many channels."""
    for key in ("mean", "std"):
        if len(data[key]) not in (1, channels):
            raise UserError(
                f"data.{key} has {len(data[key])} values for model.channels={channels}; "
                f"give one value, or one for each channel, for example --config.data.{key}='(0.5,)'"
            )
    if not min(data.std) > 1e-6:
        raise UserError(f"data.std={tuple(data.std)} must be above 1e-6")
    if data.augmentation == "rand_augment" and channels not in (1, 3):
        raise UserError(
            f"data.augmentation=rand_augment takes pictures of 1 or 3 channels, not model.channels={channels}; "
            "set data.augmentation=none"
        )


def expand_paths(config: ConfigDict) -> None:
    """Expands a leading ~ in settings that are paths: shells do not, in `--config.KEY=~/...`."""
    for key in PATHS:
        if path := get(config, key):
            config.update_from_flattened_dict({key: os.path.expanduser(path)})


def check_agreement(config: ConfigDict, workdir: Path) -> None:
    """Raises UserError if this process's settings differ from process 0's, or it does not see that one's files."""
    if process_count() == 1:
        return
    own, index = flatten(config.to_dict()), jax.process_index()
    theirs, token = from_main((own, secrets.token_hex(8)))
    for key, value in theirs.items():
        if key not in LOCAL and own.get(key) != value:
            raise UserError(
                f"{key}={own.get(key)!r} in process {index}, but {value!r} in process 0: all processes need the same "
                "command"
            )
    note = workdir / f".seen_by_all_{token}"
    if is_main():
        note.touch()
    wait_for_all()
    for _ in range(2 * SEEN_SECONDS):
        list(workdir.iterdir())  # makes a network file system refresh its cache
        if note.exists():
            break
        time.sleep(0.5)
    else:
        raise UserError(
            f"--workdir={workdir} of process {index} is not that of process 0: give a folder that all hosts share"
        )
    wait_for_all()
    if is_main():
        note.unlink()
