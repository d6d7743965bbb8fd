"""What somebody may have meant: the nearest name by what other programs call it, by its words, or by its spelling."""

import difflib
import re
from collections.abc import Iterable

# What a setting, or the flag that serves, is called elsewhere; whole names or words of them.
SETTINGS = {
    "init_from": "checkpoint ckpt pretrained resume weights load finetune from",
    "seed": "random_seed rng",
    "--workdir": "output out output_dir out_dir save_dir log_dir logdir work_dir run_dir",
    "--dry_run": "dryrun dry",
    "model.image_size": "size resolution res img_size input_size crop_size pixels img",
    "model.channels": "grey gray grayscale in_chans",
    "model.width": "dim embed_dim hidden hidden_size hidden_dim",
    "model.depth": "layers blocks",
    "model.num_heads": "head heads",
    "model.mask_ratio": "mask masking ratio",
    "model.normalize_targets": "norm_pix norm_pix_loss",
    "model.dtype": "precision mixed_precision fp16 bf16 amp half float16",
    "model.remat": "checkpointing gradient_checkpointing",
    "data.name": "dataset",
    "data.path": "folder dir root data data_dir data_path data_root",
    "data.eval_split": "split test val validation",
    "data.batch_size": "batch bs bsz",
    "data.num_workers": "workers",
    "data.augmentation": "aug augment aa",
    "classifier.drop_path": "dropout drop",
    "train.epochs": "num_epochs max_epochs",
    "train.steps": "iterations iters max_iter num_steps max_steps",
    "train.accumulate_steps": "accumulation accum accum_iter grad_accum",
    "optimizer.name": "optimizer optim opt",
    "optimizer.base_learning_rate": "lr blr rate learning_rate",
    "optimizer.min_learning_rate": "min_lr",
    "optimizer.b1": "beta beta1 betas",
    "optimizer.b2": "beta2",
    "optimizer.weight_decay": "wd decay",
    "optimizer.clip_norm": "clip grad_clip clip_grad",
    "checkpoint.every_steps": "save save_every save_steps save_freq",
    "evaluate.every_steps": "eval eval_every eval_steps eval_freq",
    "train.log_every_steps": "log print_freq log_every",
    "mesh.data": "gpu gpus num_gpus devices device",
}
# The same of configs.
CONFIGS = {
    "small_photos": "pretrain pretraining train own photos photo pictures images image laptop cpu",
    "image_folder": "folder imagefolder custom",
    "vit_base": "mae vit vit_b vitb vit_b_16 vitb16 mae_vit_base_patch16 imagenet base",
    "vit_large": "vit_l vitl vit_l_16 large",
    "vit_huge": "vit_h vith vit_h_14 huge",
    "vit_small": "vit_s vits small tiny vit_tiny",
    "cifar10": "cifar",
    "digits": "mnist demo example quickstart",
    "finetune": "finetuning fine_tune finetune_photos finetune_own classify classifier",
    "linear_probe": "probe probing linear lincls linprobe",
    "evaluate": "eval evaluation test validate",
    "reconstruct": "visualize visualise reconstruction predict inference",
    "features": "embed embeddings extract",
    "export": "convert",
}
TYPING_ERROR = 0.7  # how alike two spellings are, of 1, if one was meant to be the other


def nearest(word: str, words: Iterable[str]) -> str:
    """A hint such as `; did you mean "digits"?`, or nothing if no word is near in its spelling."""
    close = difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else ""


def nearest_setting(key: str, known: Iterable[str]) -> str:
    """A hint as `nearest`, by the names of settings, their words and what they are called elsewhere."""
    found = find_meant(key, known, SETTINGS)
    return f'; did you mean "{found}"?' if found else ""


def find_meant(asked: str, known: Iterable[str], elsewhere: dict[str, str]) -> str | None:
    """The known name that is most likely meant, or a `--flag` of `elsewhere`; None if none is near.

    Args:
      known: dotted names; the first of those that are equally near counts.
      elsewhere: name -> what it is called elsewhere.
    """
    known = list(known)
    leaf = _leaf(asked)
    names = {name: target for target, texts in elsewhere.items() for name in texts.split()}
    names = {name: target for name, target in names.items() if target in known or target.startswith("--")}
    if leaf in names or not known:
        return names.get(leaf)

    def alike(name: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, asked, name).ratio()
        return max(whole, difflib.SequenceMatcher(None, leaf, _leaf(name)).ratio()), whole

    def shared(name: str) -> float:
        own = _words(_leaf(name))
        return len(words & own) / len(words | own)

    words = set().union(*(_words(_leaf(names.get(part, part))) for part in leaf.split("_")))
    by_words = max(known, key=lambda name: (shared(name), alike(name)))
    by_spelling = max(known, key=alike)
    for found, likely in ((by_words, shared(by_words) >= 0.5), (by_spelling, alike(by_spelling)[0] >= TYPING_ERROR)):
        if likely:
            return found
    return by_words if shared(by_words) > 0 else None


def _words(name: str) -> set[str]:
    return {word.removesuffix("s") for word in name.split("_")}


def _leaf(name: str) -> str:
    """The last part of a name, as settings are spelt: Train.Batch-Size -> batch_size."""
    return re.sub(r"\W+", "_", name.rsplit(".", 1)[-1].lower()).strip("_")
