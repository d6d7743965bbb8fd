import importlib
from pathlib import Path

import pytest

from configs import common, digits
from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import READS, check_read, reads
from mae_jax.settings.fields import flatten
from mae_jax.tasks import TASKS
from mae_jax.tasks.ablation.jobs import resolve

NAMES = sorted(path.stem for path in Path("configs").glob("*.py") if path.stem != "__init__")


def refusal(name: str, *arguments: str) -> str:
    with pytest.raises(UserError) as error:
        resolve([f"--config=configs/{name}.py", *(f"--config.{argument}" for argument in arguments)])
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_sets_only_what_its_task_reads_or_what_it_has_from_another_one(name):
    check_read(importlib.import_module(f"configs.{name}").get_config())


def test_each_task_has_a_row_and_each_setting_a_task_that_reads_it():
    assert set(TASKS) <= READS.keys()
    known = flatten(common.get_config().to_dict())
    assert [key for key in known if not any(reads(task, key) for task in TASKS)] == []
    for task, row in READS.items():
        for word in row.split():
            name = word.lstrip("-")
            assert any(key.startswith(name[:-1]) if name.endswith("*") else key == name for key in known), (task, word)


@pytest.mark.parametrize(
    "name, setting",
    [
        ("digits", "data.erasing=0.25"), ("digits", "data.mixup=0.8"), ("digits", "data.cutmix=1.0"),
        ("digits", "data.label_fraction=0.5"), ("digits", "classifier.pool=class"), ("digits", "format=timm"),
        ("digits", "encoder_only=True"),
        ("digits", "evaluate.knn_sweep_k=(1,)"), ("digits", "ablate.seeds=(1,)"),
        ("finetune_digits", "evaluate.mask=masks.npy"), ("finetune_digits", "evaluate.mask_ratio=0.5"),
        ("finetune_digits", "evaluate.knn_k=5"), ("finetune_digits", "evaluate.token=class"),
        ("finetune_digits", "model.decoder_depth=3"), ("finetune_digits", "model.mask_ratio=0.5"),
        ("finetune_digits", "model.mask_sampling=block"), ("finetune_digits", "format=timm"),
        ("knn", "evaluate.mask=masks.npy"), ("knn", "train.epochs=3"), ("knn", "optimizer.name=muon"),
        ("knn", "data.batch_size=8"), ("knn", "data.flip=False"), ("knn", "evaluate.probe_c=2"),
        ("knn", "checkpoint.keep=1"), ("knn", "classifier.pool=class"), ("knn", "format=timm"),
        ("logistic_regression", "evaluate.knn_k=5"), ("logistic_regression", "evaluate.pictures=3"),
        ("features", "evaluate.random_encoder=False"), ("features", "evaluate.probe_c=2"),
        ("evaluate", "evaluate.token=class"), ("evaluate", "data.label_fraction=0.5"), ("evaluate", "data.mixup=0.8"),
        ("reconstruct", "evaluate.max_train_examples=9"), ("reconstruct", "evaluate.linear_probe=False"),
        ("export", "evaluate.batch_size=8"), ("export", "seed=1"), ("export", "mesh.fsdp=2"),
        ("ablations/mask_ratio", "data.mixup=0.8"),
    ],
)  # fmt: skip
def test_a_setting_of_the_command_line_that_the_task_does_not_read_is_refused(name, setting):
    message = refusal(name, setting)
    assert message.startswith(setting.split("=")[0]) and "is not for the task" in message and "leave it out" in message


def test_the_tasks_that_a_setting_is_for_are_named():
    assert "not for the task pretrain, only for classify: leave it out" in refusal("digits", "data.mixup=0.8")


def test_pretraining_uses_layer_decay_as_every_optimizer_does():
    assert resolve(["--config=configs/digits.py", "--config.optimizer.layer_decay=0.75"]).optimizer.layer_decay == 0.75


def test_the_usual_value_is_no_mistake_anywhere():
    resolve(["--config=configs/knn.py", "--config.train.epochs=800", "--config.evaluate.mask=None"])


def test_what_a_file_has_from_the_config_that_it_starts_from_may_stand():
    config = digits.get_config()  # with train.epochs, model.decoder_width, ...
    for task in ("pretrain", "classify", "knn", "evaluate", "export"):
        config.task = task
        check_read(config)
    config.data.erasing = 0.25
    config.task = "evaluate"  # of a classifier that was trained so
    check_read(config)
    config.task = "pretrain"  # which nothing else explains
    with pytest.raises(UserError, match="data.erasing=0.25 is not for the task pretrain"):
        check_read(config)


def test_pictures_by_hand_are_refused_of_a_classifier_that_is_evaluated():
    config = common.get_config()
    config.task, config.evaluate.mask, config.given = "evaluate", "masks.npy", ("evaluate.mask",)
    check_read(config)
    with pytest.raises(UserError, match="evaluate.mask='masks.npy' is not for the task evaluate a classifier"):
        check_read(config, "evaluate a classifier")


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("digits", ["data.path=pictures"], "data.path='pictures' is not used with data.name=digits"),
        ("digits", ["data.stratify=False"], "data.stratify=False is not used with data.name=digits"),
        ("image_folder", ["data.num_examples=9"], "with data.name=image_folder"),
        ("digits", ["data.stratify=False"], "with data.name=digits"),
        ("cifar10", ["data.eval_fraction=0.5"], "with data.name=cifar10"),
        ("digits", ["optimizer.momentum=0.5"], "with optimizer.name=adamw"),
        ("digits", ["optimizer.name=muon", "optimizer.momentum=0.5"], "with optimizer.name=muon"),
        ("linear_probe_digits", ["optimizer.b2=0.5"], "with optimizer.name=lars"),
        ("digits", ["data.rand_augment_ops=3"], "with data.augmentation=none"),
        ("digits", ["assume.num_heads=3"], "with init_from=None"),
        ("finetune_digits", ["classifier.random_encoder=True"], "with init_from=None"),
    ],
)
def test_a_setting_that_another_one_leaves_without_use_is_refused(name, settings, expected):
    assert expected in refusal(name, *settings)


def test_a_setting_of_another_version_that_a_checkpoint_brings_along_is_no_mistake():
    config = digits.get_config()
    with config.unlocked():
        config.data.of_old = 3
    check_read(config)


def test_an_objective_of_ones_own_may_use_what_both_of_ours_use_and_no_more():
    for key in ("model.mask_ratio", "classifier.pool", "train.steps"):
        assert reads("mine:Objective", key)
    assert not reads("mine:Objective", "format")


def test_a_version_of_a_tfds_data_set_is_no_class_of_ones_own():
    asked = ("data.label_column=age", "data.eval_fraction=0.2")
    for setting in asked:
        assert "is not used with data.name=mnist:3.0.1" in refusal("digits", "data.name=mnist:3.0.1", setting)
    resolve(["--config=configs/digits.py", "--config.data.name=tests.label_sources:Numbers", f"--config.{asked[1]}"])
