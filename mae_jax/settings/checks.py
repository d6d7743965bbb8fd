"""Checks of the settings before any data are read: their values, that the task uses them, all processes alike."""

import fnmatch
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
from mae_jax.settings.fields import FLOAT32_MAX, INT32_MAX, defaults, flatten, get
from mae_jax.settings.registry import nearest
from mae_jax.settings.shapes import check_shapes

# Interval -> settings whose number, or each of whose numbers, must lie in it; None is not checked. Beyond the upper
# limits a run would not start, or would never end.
RANGES = {
    "[1, inf)": "data.batch_size data.num_threads train.steps train.log_every_steps train.accumulate_steps "
    "checkpoint.every_steps checkpoint.keep checkpoint.keep_every_steps evaluate.every_steps evaluate.batch_size "
    "evaluate.max_train_examples evaluate.max_examples prepare.short_side inspect.max_examples "
    "evaluate.probe_sweep_batch_size",
    "(-inf, inf)": "data.mean",
    "[0, inf)": "data.std data.rand_augment_magnitude_std train.skip_nonfinite optimizer.base_learning_rate "
    "optimizer.min_learning_rate optimizer.warmup_epochs optimizer.weight_decay",
    "(0, inf)": "data.crop_ratio train.epochs optimizer.epsilon optimizer.trust_coefficient optimizer.clip_norm "
    "evaluate.probe_sweep_epochs",
    "[0, 1]": "data.color_jitter data.erasing data.mix_probability data.mix_switch_probability optimizer.layer_decay",
    "(0, 1]": "data.crop_scale data.label_fraction data.eval_fraction optimizer.decay_fraction",
    "[0, 1)": "classifier.drop_path classifier.label_smoothing optimizer.b1 optimizer.b2 optimizer.momentum "
    "optimizer.muon_momentum train.ema_decay",
    "[0.001, 0.5]": "evaluate.probe_sweep_held_out",
    "[0.01, 1]": "data.eval_crop",
    "[0, 10]": "data.rand_augment_magnitude",
    "[0, 1000]": "predict.pictures retrieve.pictures data.num_workers data.mixup data.cutmix classifier.head_std "
    "train.profile_steps",
    "[1, 1000]": "data.rand_augment_ops data.prefetch_batches evaluate.shots evaluate.shot_draws evaluate.pictures "
    "predict.top inspect.crops reconstruct.masks retrieve.k",
    "[1, 100]": "prepare.quality",
    "[1, 1000000]": "classifier.num_classes prepare.shard_examples",
    "[1, 10000]": "evaluate.knn_k evaluate.knn_sweep_k",
    "[4, 10000000]": "data.num_examples",
    "[1, 178956970]": "data.max_pixels",
    "[1e-10, 1e10]": "evaluate.knn_temperature evaluate.knn_sweep_temperature evaluate.probe_c evaluate.probe_sweep_c "
    "evaluate.shot_penalties evaluate.probe_sweep_rates",
    "[0, 4294967295]": "seed data.seed",
    "[0, 65535]": "demo.port",
}
WHOLE = ("evaluate.knn_sweep_k", "evaluate.shots")  # lists of whole numbers
INTERVALS = {key: interval for interval, keys in RANGES.items() for key in keys.split()}
CHOICES = {
    "data.augmentation": ("none", "rand_augment"),
    "data.crop_rule": ("retry", "clip", "centre"),
    "data.on_bad_image": ("replace", "raise"),
    "data.label_kind": ("class", "multi", "number", None),
    "data.dtype": ("uint8", "uint16", "int16", "float16", "float32", None),
    "classifier.class_weights": ("balanced", None),
    "evaluate.token": ("mean", "class", "patches"),
    "features.format": ("parquet", "npy"),
}
PATHS = (
    "init_from data.path data.root data.statistics evaluate.mask demo.index retrieve.index retrieve.queries"
).split()
LOCAL = (*PATHS[1:3], "data.num_threads", "data.num_workers", "data.prefetch_batches", "given")  # of each process
SEEN_SECONDS = 10  # for a file to appear on other hosts: network file systems cache

# Which settings each task reads. The rest must keep their defaults, so no setting is silently ignored.
EVERY = "task given file init_from assume.* model.* data.* logging.* "
# "-" removes keys, "*" is any ending: what some tasks do not read of these groups.
NO_LABELS = "-data.label_fraction "
NO_MIXING = "-data.erasing -data.mixup -data.cutmix -data.mix_* "
NO_TRAINING = "-data.batch_size -data.crop_* -data.flip -data.color_jitter -data.augmentation "
NO_TRAINING += "-data.rand_augment_* -data.on_device "

TRAINS = EVERY + "init_channels seed mesh.* train.* optimizer.* checkpoint.* evaluate.every_steps evaluate.batch_size "
TRAINS += "evaluate.max_examples evaluate.evaluators "
# Model and pictures are the checkpoint's; the tasks compare them with these settings.
MEASURES = EVERY + NO_MIXING + NO_TRAINING + "seed mesh.* evaluate.batch_size evaluate.max_examples "
FEATURES = "evaluate.token evaluate.layer evaluate.max_train_examples "
HIDES = "evaluate.mask evaluate.mask_ratio evaluate.pictures evaluate.shown_channels "
KNN = "evaluate.knn_k evaluate.knn_temperature "
PROBE = "evaluate.probe_c "
SHOTS = "evaluate.shots evaluate.shot_* "
# Which pictures there are, and how they are read.
PICTURES = "task given file model.image_size model.channels data.name data.path data.root data.train_split "
PICTURES += "data.eval_split data.image_column data.label_column data.split_column data.group_column "
PICTURES += "data.eval_fraction data.stratify data.label_kind data.label_separator data.extensions data.num_* "
PICTURES += "data.on_bad_image data.max_pixels data.dtype data.bands "

READS = {
    "pretrain": TRAINS + NO_LABELS + NO_MIXING + FEATURES + HIDES + KNN + PROBE + SHOTS
    + "evaluate.random_encoder evaluate.linear_probe",
    "classify": TRAINS + "classifier.* -model.decoder_* -model.mask_* -model.encoder_mask_tokens -model.loss_patches "
    "-model.pca_targets -model.target -model.prediction_ratio -model.masks_per_image -model.uniformity "
    "-model.normalize_targets -model.positions",
    "knn": MEASURES + FEATURES + KNN + "evaluate.knn_sweep_* evaluate.random_encoder",
    "logistic_regression": MEASURES + FEATURES + PROBE + "evaluate.probe_sweep_c evaluate.random_encoder",
    "few_shot": MEASURES + FEATURES + SHOTS + "evaluate.random_encoder",
    "probe_sweep": MEASURES + "evaluate.max_train_examples evaluate.layers evaluate.probe_sweep_rates "
    "evaluate.probe_sweep_epochs evaluate.probe_sweep_batch_size evaluate.probe_sweep_held_out evaluate.random_encoder",
    "features": MEASURES + FEATURES + "features.*",
    "retrieve": MEASURES + NO_LABELS + FEATURES + "retrieve.* evaluate.shown_channels",
    "evaluate": MEASURES + NO_LABELS + HIDES + SHOTS + "evaluate.evaluators",
    "evaluate a classifier": MEASURES + NO_LABELS + SHOTS + "evaluate.evaluators",
    "reconstruct": MEASURES + NO_LABELS + HIDES + "evaluate.evaluators reconstruct.*",
    "predict": MEASURES + NO_LABELS + "predict.* evaluate.shown_channels",
    "demo": MEASURES + NO_LABELS + "-mesh.* -logging.* -evaluate.batch_size -evaluate.max_examples demo.* "
    "evaluate.token evaluate.layer evaluate.mask_ratio evaluate.pictures evaluate.shown_channels",
    "prepare": PICTURES + "prepare.*",
    "inspect": PICTURES + "inspect.* data.value_range data.seed data.crop_* data.flip "
    "data.color_jitter data.augmentation data.rand_augment_* evaluate.shown_channels",
    "export": EVERY + NO_LABELS + NO_MIXING + NO_TRAINING + "-logging.* format encoder_only",
}  # fmt: skip
READS["ablate"] = READS["pretrain"] + " ablate.* shard"
# Tasks whose settings a config may inherit by starting from theirs. On a command line such settings are a mistake.
INHERITS = {"ablate": (), "pretrain": ("ablate",), "classify": ("pretrain",)}
MEASURES_INHERIT = ("pretrain", "classify")  # by the tasks that take a checkpoint

# (setting, value) -> settings without effect at this value; refused on a command line.
UNUSED_WITH = {
    ("init_from", None): "assume.* classifier.random_encoder init_channels",
    ("data.name", "digits"): "data.path data.train_split data.eval_split",
    ("data.name", "synthetic"): "data.path data.train_split data.eval_split",
    ("data.name", "prepared"): "data.train_split data.eval_split",
    ("data.augmentation", "none"): "data.rand_augment_*",
    ("optimizer.name", "adamw"): "optimizer.muon_momentum optimizer.momentum optimizer.trust_coefficient",
    ("optimizer.name", "muon"): "optimizer.momentum optimizer.trust_coefficient",
    ("optimizer.schedule", "cosine"): "optimizer.decay_fraction",
    ("optimizer.schedule", "constant"): "optimizer.decay_fraction optimizer.min_learning_rate",
    ("optimizer.name", "lars"): "optimizer.b1 optimizer.b2 optimizer.epsilon optimizer.muon_momentum",
}
# Settings -> the only values of data.name that use them.
ONLY_WITH = {
    "data.num_examples": "synthetic",
    "data.extensions": "image_folder",
    "data.root": "table",
    "data.image_column data.split_column data.group_column": "table parquet webdataset",
    "data.label_column data.label_kind data.label_separator": "table parquet webdataset",
    "data.eval_fraction data.stratify": "image_folder table parquet webdataset",
}
NAMES_OF = {key: names.split() for keys, names in ONLY_WITH.items() for key in keys.split()}


def check(config: ConfigDict) -> None:
    """Raises UserError for any value that is wrong whatever the data and devices are."""
    for key, value in flatten(config.to_dict()).items():
        if value is None and key not in _may_be_none():
            raise UserError(f"{key}=None: this setting needs a value")
        # Of an ablation, the settings of each cell are checked instead.
        if value is not None and not key.startswith(("ablate.", "data.value_range")):
            _check_numbers(key, value)
        if key in CHOICES and value not in CHOICES[key]:
            choices = [choice for choice in CHOICES[key] if choice]
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
    if config.evaluate.token == "patches" and config.task != "features":
        raise UserError("evaluate.token=patches is for the task features alone: choose mean or class")
    check_shapes(config)


@functools.cache
def _may_be_none() -> set[str]:
    """The settings that configs/common.py defines by `placeholder` or FieldReference."""
    fields = flatten(defaults().to_dict(preserve_field_references=True))
    return {key for key, field in fields.items() if isinstance(field, FieldReference)}


def _check_numbers(key: str, value: Any) -> None:
    """Raises UserError unless a number, or each of a list, is in the setting's interval and fits into 32 bits."""
    interval, kinds = INTERVALS.get(key, "(-inf, inf)"), int if key in WHOLE else int | float
    numbers = value if isinstance(value, list) else [value]
    if key not in INTERVALS:
        numbers = [number for number in numbers if isinstance(number, kinds)]
    whole = all(isinstance(number, int) for number in numbers) and not key.endswith("seed")
    limit = INT32_MAX if whole else FLOAT32_MAX
    low, high = (min(max(float(end), -limit), limit) for end in interval[1:-1].split(","))

    def inside(number: Any) -> bool:
        at_limit = interval[0] == "(" and number == low or interval[-1] == ")" and number == high < limit
        return isinstance(number, kinds) and low <= number <= high and not at_limit

    if not all(map(inside, numbers)) or key in INTERVALS and not numbers:
        limits = f"{interval[0]}{low:.10g}, {high:.10g}{interval[-1]}"
        if not isinstance(value, list):
            raise UserError(f"{key}={value} is outside {limits}")
        kind, example = "whole numbers" if kinds is int else "numbers", flatten(defaults().to_dict())[key]
        hint = f", for example --config.{key}='{tuple(example)}'" if isinstance(example, list) and example else ""
        raise UserError(f"{key}={tuple(value)} must be {kind} in {limits}{hint}")


def check_channels(data: ConfigDict, channels: int) -> None:
    """Raises UserError unless the settings `data` fit pictures with this many channels."""
    for key in ("mean", "std"):
        if len(data[key]) not in (1, channels):
            raise UserError(
                f"data.{key} has {len(data[key])} values for model.channels={channels}; "
                f"give one value, or one for each channel, for example --config.data.{key}='(0.5,)'"
            )
        if (data.value_range is not None or data.dtype == "uint8") and not all(0 <= x <= 1 for x in data[key]):
            unit = "on [0, 1], from black to white of 8-bit pictures, or from low to high of data.value_range"
            raise UserError(f"data.{key}={tuple(data[key])} must be {unit}")
    if not min(data.std) > 1e-6:
        raise UserError(f"data.std={tuple(data.std)} must be above 1e-6")
    if data.bands is not None and len(data.bands) != channels:
        raise UserError(
            f"data.bands={tuple(data.bands)} must be model.channels={channels} channels of the pictures, for example "
            f"--config.data.bands='{tuple(range(channels))}'"
        )


def check_colours(data: ConfigDict, channels: int) -> None:
    """Raises UserError if colours are changed of pictures that have none."""
    for key, off in (("augmentation", "none"), ("color_jitter", 0.0)):
        if data[key] != off and (channels not in (1, 3) or data.dtype not in ("uint8", None)):
            found = f"model.channels={channels}" if channels not in (1, 3) else f"data.dtype={data.dtype}"
            raise UserError(
                f"data.{key}={data[key]} takes 8-bit pictures of 1 or 3 channels, not {found}; set data.{key}={off}"
            )


def expand_paths(config: ConfigDict) -> None:
    """Expands a leading ~ in settings that are paths: shells do not, in `--config.KEY=~/...`."""
    for key in PATHS:
        if path := get(config, key):
            config.update_from_flattened_dict({key: os.path.expanduser(path)})


def reads(task: str, key: str) -> bool:
    """Whether a task (a row of READS) uses a setting; a custom objective may use those of pretrain and classify."""
    if ":" in task:
        return reads("pretrain", key) or reads("classify", key)
    found = [word for word in READS[task].split() if fnmatch.fnmatchcase(key, word.lstrip("-"))]
    return bool(found) and not any(word.startswith("-") for word in found)


def check_read(config: ConfigDict, row: str | None = None) -> None:
    """Raises UserError for a changed setting that the task ignores. `row`: a row of READS, by default the task's."""
    task = row or config.task
    if task not in READS and ":" not in task:
        known = ", ".join(name for name in READS if " " not in name)
        raise UserError(f"unknown task {task!r}{nearest(task, READS)} (config.task is one of {known}, or module:class)")
    usual = flatten(defaults().to_dict())
    changed = {key: value for key, value in flatten(config.to_dict()).items() if value != usual.get(key, value)}
    for key, value in changed.items():
        inherited = key not in config.given and any(reads(other, key) for other in INHERITS.get(task, MEASURES_INHERIT))
        if not inherited and not reads(task, key):
            users = ", ".join(other for other in READS if reads(other, key))
            raise UserError(f"{key}={value!r} is not for the task {task}, only for {users}: leave it out")
        if key in config.given and (cause := unused_with(config, key)):
            raise UserError(f"{key}={value!r} is not used with {cause}: leave it out")


def unused_with(config: ConfigDict, key: str) -> str | None:
    """The setting, such as "data.name=digits", that makes another one useless; None if there is none."""
    name = config.data.name
    own = name is None or name.partition(":")[2].isidentifier()  # module:Class, but not a TFDS set's version
    if key in NAMES_OF and not own and name not in NAMES_OF[key]:
        return f"data.name={name}"
    for (other, value), patterns in UNUSED_WITH.items():
        if get(config, other) == value and any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns.split()):
            return f"{other}={value}"
    return None


def check_agreement(config: ConfigDict, workdir: Path) -> None:
    """Raises UserError if this process's settings differ from process 0's, or it does not see that one's files."""
    if process_count() == 1:
        return
    own, index = flatten(config.to_dict()), jax.process_index()
    theirs, token = from_main((own, secrets.token_hex(8)))
    for key, value in theirs.items():
        if key not in LOCAL and own.get(key) != value:
            differ = f"{key}={own.get(key)!r} in process {index}, but {value!r} in process 0"
            raise UserError(f"{differ}: all processes need the same command")
    note = workdir / f".seen_by_all_{token}"
    if is_main():
        note.touch()
    wait_for_all()
    deadline = time.monotonic() + SEEN_SECONDS
    while not note.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"--workdir={workdir} of process {index} is not that of process 0: give a folder that all hosts share"
            )
        list(workdir.iterdir())  # makes a network file system refresh its cache
        time.sleep(0.5)
    wait_for_all()
    if is_main():
        note.unlink()
