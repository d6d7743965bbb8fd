"""Registries of implementations that a setting can name, and hints for unknown names."""

import difflib
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from mae_jax.runtime.errors import UserError, first_line

T = TypeVar("T")

# Setting or flag -> its names, or words of them, in other programs, if its own words do not suggest them.
SETTING_WORDS = {
    "init_from": "checkpoint ckpt pretrained resume weights load finetune",
    "seed": "random_seed rng",
    "--workdir": "output out output_dir out_dir save_dir log_dir logdir work_dir run_dir",
    "--dry_run": "dryrun dry",
    "model.image_size": "size resolution res pixels img",
    "model.channels": "grey gray grayscale in_chans",
    "model.width": "dim embed_dim hidden hidden_size",
    "model.depth": "layers blocks",
    "model.num_heads": "head heads",
    "model.mask_ratio": "mask masking ratio",
    "model.normalize_targets": "norm_pix norm_pix_loss",
    "model.dtype": "precision fp16 bf16 amp half float16",
    "model.remat": "checkpointing",
    "data.name": "dataset",
    "data.path": "folder dir root data",
    "data.eval_split": "test val validation",
    "data.batch_size": "bs bsz",
    "data.augmentation": "aug augment aa",
    "classifier.drop_path": "dropout",
    "train.steps": "iterations iters max_iter",
    "train.accumulate_steps": "accumulation accum",
    "optimizer.name": "optimizer optim opt",
    "optimizer.base_learning_rate": "lr blr rate",
    "optimizer.b1": "beta beta1 betas",
    "optimizer.b2": "beta2",
    "optimizer.weight_decay": "wd decay",
    "checkpoint.every_steps": "save save_every save_steps save_freq",
    "evaluate.every_steps": "eval",
    "train.log_every_steps": "log print_freq log_every",
    "logging.writers": "logger loggers log_with report_to tracker tensorboard wandb mlflow",
    "mesh.data": "gpu gpus num_gpus devices device",
}
# The same for configs.
CONFIG_WORDS = {
    "small_photos": "pretrain pretraining train own pictures images image laptop cpu",
    "image_folder": "custom",
    "vit_base": "mae vitb16 imagenet",
    "vit_large": "vitl",
    "vit_small": "vit_s vits tiny",
    "digits": "mnist example quickstart",
    "finetune": "finetuning classify classifier",
    "linear_probe": "probe probing lincls",
    "evaluate": "test",
    "reconstruct": "visualize visualise anomaly outlier",
    "predict": "inference",
    "retrieve": "neighbours neighbors similar search",
    "demo": "gradio page",
    "features": "embed embeddings extract",
    "export": "convert",
}
TYPING_ERROR = 0.7  # similarity, at most 1, from which a name counts as misspelt


class Registry(dict[str, T], Generic[T]):
    """Name -> implementation, for one setting, given by its dotted key.

    A name "module:name" is imported, without registration. An implementation may be such a string, imported on demand.
    """

    def __init__(self, setting: str):
        super().__init__()
        self._setting = setting

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator: registers a function or class under a name."""

        def add(implementation: T) -> T:
            self[name] = implementation
            return implementation

        return add

    def find(self, name: str) -> T:
        """The implementation with this name; UserError if it is unknown or cannot be imported."""
        found = self.get(name, str(name))
        if not isinstance(found, str):
            return found
        module, _, attribute = found.partition(":")
        if not attribute:
            raise UserError(f"{self._setting}={name!r} is not one of {', '.join(self)}{nearest(found, self)}")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"{self._setting}={name} cannot be imported: {first_line(error)}; put its file beside main.py or on "
                "PYTHONPATH, and name what it defines"
            ) from error


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint such as `; did you mean "digits"?`, or "" if no word has a similar spelling."""
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def nearest_setting(key: str, known: Iterable[str]) -> str:
    """A hint like that of `nearest`, by the names of settings, their words, and SETTING_WORDS."""
    found = find_meant(key, known, SETTING_WORDS)
    return f'; did you mean "{found}"?' if found else ""


def find_meant(asked: str, known: Iterable[str], elsewhere: dict[str, str]) -> str | None:
    """The nearest of the known dotted names (the first of equals), or a `--flag` of `elsewhere`; None: none is near."""
    known, leaf = list(known), _leaf(asked)
    names = {alias: name for name, aliases in elsewhere.items() for alias in aliases.split()}
    names = {alias: name for alias, name in names.items() if name in known or name.startswith("--")}
    if leaf in names or not known:
        return names.get(leaf)
    words = set().union(*(_words(names.get(word, word)) for word in leaf.split("_")))

    def likeness(name: str) -> tuple[float, float]:
        """Similarity of words, and of spelling."""
        own, whole = _words(name), difflib.SequenceMatcher(None, asked, name).ratio()
        leaves = difflib.SequenceMatcher(None, leaf, _leaf(name)).ratio()
        return len(words & own) / len(words | own), max(whole, leaves) + whole / 10

    best = max(known, key=lambda name: sum(likeness(name)))
    shared, spelling = likeness(best)
    return best if shared > 0 or spelling >= TYPING_ERROR else None


def _words(name: str) -> set[str]:
    return {word.removesuffix("s") for word in _leaf(name).split("_")}


def _leaf(name: str) -> str:
    """The last part of a name, spelt like a setting: Train.Batch-Size -> batch_size."""
    return re.sub(r"\W+", "_", name.rsplit(".", 1)[-1].lower()).strip("_")
