"""Which settings each task reads. The rest must keep their defaults, so no setting is silently ignored."""

import fnmatch

import ml_collections

from mae_jax.runtime.errors import UserError
from mae_jax.settings.fields import defaults, flatten, get
from mae_jax.settings.suggestions import nearest

EVERY = "task given file init_from assume.* model.* data.* logging.* "
# "-" removes keys, "*" is any ending: what some tasks do not read of these groups.
NO_LABELS = "-data.label_fraction "
NO_MIXING = "-data.erasing -data.mixup -data.cutmix -data.mix_* "
NO_TRAINING = "-data.batch_size -data.crop_* -data.flip -data.color_jitter -data.augmentation "
NO_TRAINING += "-data.rand_augment_* -data.on_device "

TRAINS = EVERY + "seed mesh.* train.* optimizer.* checkpoint.* evaluate.every_steps evaluate.batch_size "
TRAINS += "evaluate.max_examples evaluate.evaluators "
# Model and pictures are the checkpoint's; the tasks compare them with these settings.
MEASURES = EVERY + NO_MIXING + NO_TRAINING + "seed mesh.* evaluate.batch_size evaluate.max_examples "
FEATURES = "evaluate.token evaluate.max_train_examples "
HIDES = "evaluate.mask evaluate.mask_ratio evaluate.pictures "
KNN = "evaluate.knn_k evaluate.knn_temperature "
PROBE = "evaluate.probe_c "

READS = {
    "pretrain": TRAINS + NO_LABELS + NO_MIXING + FEATURES + HIDES + KNN + PROBE
    + "evaluate.random_encoder evaluate.linear_probe",
    "classify": TRAINS + "classifier.* -model.decoder_* -model.mask_* -model.encoder_mask_tokens -model.loss_patches "
    "-model.pca_targets -model.target -model.prediction_ratio -model.masks_per_image -model.uniformity "
    "-model.normalize_targets -model.positions",
    "knn": MEASURES + FEATURES + KNN + "evaluate.knn_sweep_* evaluate.random_encoder",
    "logistic_regression": MEASURES + FEATURES + PROBE + "evaluate.probe_sweep_c evaluate.random_encoder",
    "features": MEASURES + FEATURES,
    "evaluate": MEASURES + NO_LABELS + HIDES + "evaluate.evaluators",
    "evaluate a classifier": MEASURES + NO_LABELS + "evaluate.evaluators",
    "reconstruct": MEASURES + NO_LABELS + HIDES + "evaluate.evaluators",
    "export": EVERY + NO_LABELS + NO_MIXING + NO_TRAINING + "-logging.* format encoder_only",
}  # fmt: skip
READS["ablate"] = READS["pretrain"] + " ablate.* shard"
# Tasks whose settings a config may inherit by starting from theirs. On a command line such settings are a mistake.
INHERITS = {"ablate": (), "pretrain": ("ablate",), "classify": ("pretrain",)}
MEASURES_INHERIT = ("pretrain", "classify")  # by the tasks that take a checkpoint

# (setting, value) -> settings without effect at this value; refused on a command line.
UNUSED_WITH = {
    ("init_from", None): "assume.* classifier.random_encoder",
    ("data.name", "digits"): "data.path data.train_split data.eval_split",
    ("data.name", "synthetic"): "data.path data.train_split data.eval_split",
    ("data.augmentation", "none"): "data.rand_augment_*",
    ("optimizer.name", "adamw"): "optimizer.muon_momentum optimizer.momentum optimizer.trust_coefficient",
    ("optimizer.name", "muon"): "optimizer.momentum optimizer.trust_coefficient",
    ("optimizer.schedule", "cosine"): "optimizer.decay_fraction",
    ("optimizer.schedule", "constant"): "optimizer.decay_fraction optimizer.min_learning_rate",
    ("optimizer.name", "lars"): "optimizer.b1 optimizer.b2 optimizer.epsilon optimizer.muon_momentum",
}
# Setting -> the only data.name that uses it.
ONLY_WITH = {"data.num_examples": "synthetic", "data.eval_fraction": "image_folder", "data.stratify": "image_folder"}


def reads(task: str, key: str) -> bool:
    """Whether a task (a row of READS) uses a setting; a custom objective may use those of pretrain and classify."""
    if ":" in task:
        return reads("pretrain", key) or reads("classify", key)
    words = READS[task].split()
    return _matches(key, [w for w in words if w[0] != "-"]) and not _matches(key, [w[1:] for w in words if w[0] == "-"])


def check_read(config: ml_collections.ConfigDict, row: str | None = None) -> None:
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


def unused_with(config: ml_collections.ConfigDict, key: str) -> str | None:
    """The setting, such as "data.name=digits", that makes another one useless; None if there is none."""
    name = config.data.name
    if key in ONLY_WITH and name not in (ONLY_WITH[key], None):
        return f"data.name={name}"
    causes = (cause for cause, keys in UNUSED_WITH.items() if _matches(key, keys.split()))
    return next((f"{other}={value}" for other, value in causes if get(config, other) == value), None)


def _matches(key: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
