"""What is suggested for a name that does not exist."""

from pathlib import Path

import pytest

from configs import common
from mae_jax.settings.fields import flatten
from mae_jax.settings.registry import CONFIG_WORDS, SETTING_WORDS, find_meant, nearest, nearest_setting


@pytest.mark.parametrize("text", [
    "batch data.batch_size", "train.batch data.batch_size", "batchsize data.batch_size",
    "lr optimizer.base_learning_rate",
    "optimizer.lr optimizer.base_learning_rate", "min_lr optimizer.min_learning_rate", "epochs train.epochs",
    "num_epoch train.epochs", "size model.image_size", "resolution model.image_size", "workers data.num_workers",
    "wd optimizer.weight_decay", "warmup optimizer.warmup_epochs", "mask model.mask_ratio", "dataset data.name",
    "gpus mesh.data", "fp16 model.dtype", "amp model.dtype", "resume init_from", "pretrained init_from",
    "output_dir --workdir", "patch model.patch_size", "decoder_layers model.decoder_depth",
    "model.decoder_dim model.decoder_width", "trian.steps train.steps", "Batch-Size data.batch_size",
    "smoothing classifier.label_smoothing",
])  # fmt: skip
def test_the_hint_for_a_setting_is_what_is_meant_by_other_programs_name_its_words_or_its_spelling(text):
    asked, meant = text.split()
    assert nearest_setting(asked, flatten(common.get_config().to_dict())) == f'; did you mean "{meant}"?'


@pytest.mark.parametrize("text", [
    "pretrain small_photos", "own small_photos", "photos small_photos", "images small_photos", "mae vit_base",
    "vit vit_base", "vit_b vit_base", "vit-base vit_base", "ViT-B16 vit_base", "cifar cifar10", "probe linear_probe",
    "fine_tune finetune", "eval evaluate", "finetune_vit_b finetune_vit_base", "digit digits",
])  # fmt: skip
def test_the_hint_for_a_config_is_what_is_meant(text):
    asked, meant = text.split()
    there = {path.stem for path in Path("configs").glob("*.py")} | {"small_photos", "finetune", "linear_probe"}
    assert find_meant(asked, sorted(there), CONFIG_WORDS) == meant


def test_every_name_in_the_tables_of_hints_exists():
    known = flatten(common.get_config().to_dict())
    assert all(name in known for name in SETTING_WORDS if not name.startswith("--"))
    names = [alias for text in SETTING_WORDS.values() for alias in text.split()]
    assert len(names) == len(set(names))


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("zzz", ["digits", "synthetic"]) == ""
    assert nearest_setting("zzz", ["data.seed", "train.steps"]) == nearest_setting("zzz", []) == ""
