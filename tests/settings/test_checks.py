import importlib
import shlex
from pathlib import Path

import ml_collections
import pytest
from ml_collections.config_dict import FieldReference

from configs import common, digits, finetune_vit_base
from mae_jax.runtime.errors import UserError
from mae_jax.settings.checks import CHOICES, RANGES, expand_paths
from mae_jax.settings.command_line import (
    asks_for_help,
    check_command_line,
    describe_configs,
    describe_unknown_flag,
    given_settings,
)
from mae_jax.settings.fields import flatten, from_dict, get
from mae_jax.tasks import TASKS, check_task
from mae_jax.tasks.ablation.jobs import resolve

NAMES = sorted(path.stem for path in Path("configs").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_passes_its_own_checks_and_names_a_task_and_its_command(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    if config.task == "classify" and config.data.name is None:
        with pytest.raises(UserError, match="init_from is not set"):
            check_task(config)
        config.init_from = "runs/mine"
    check_task(config)
    assert config.task in TASKS
    assert flatten(config.to_dict()).keys() == flatten(common.get_config().to_dict()).keys()
    assert name == "common" or f"--config=configs/{name}.py" in module.__doc__


@pytest.mark.parametrize("name, parameters", [("base", 111_655_680), ("large", 329_239_296), ("huge", 656_613_964)])
def test_the_imagenet_configs_have_the_papers_recipe_and_sizes(name, parameters):
    import jax

    from mae_jax.models.mae import MAEConfig, init_params
    from mae_jax.models.parameters import count_parameters

    config = importlib.import_module(f"configs.vit_{name}").get_config()
    model = MAEConfig(**config.model)
    abstract = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert count_parameters(abstract) == parameters
    optimizer = config.optimizer
    assert (config.data.batch_size, config.train.epochs, optimizer.warmup_epochs) == (4096, 800, 40)
    assert (optimizer.base_learning_rate, optimizer.weight_decay, optimizer.b1, optimizer.b2) == (
        1.5e-4,
        0.05,
        0.9,
        0.95,
    )
    assert model.normalize_targets and model.mask_ratio == 0.75 and config.data.crop_scale == (0.2, 1.0)


BAD_VALUES = {
    "model.image_size  ": (10**11, 32),
    "data.batch_size": 0, "train.steps": 0, "train.epochs": 0.0, "train.epochs ": float("inf"),
    "optimizer.base_learning_rate": -1.0, "optimizer.base_learning_rate ": float("nan"), "optimizer.b2": 1.0,
    "optimizer.clip_norm": 0.0, "optimizer.muon_momentum": 1.0, "optimizer.name": "moun", "checkpoint.keep": 0,
    "evaluate.token": "cls", "evaluate.knn_temperature": 0.0, "data.seed": -1, "seed": 2**32,
    "data.crop_scale": (0.5, 1.5), "data.crop_ratio": (2.0, 1.0), "data.crop_scale ": (0.2,), "data.std ": ("a",),
    "data.mean": (0.5, 0.5), "data.std": (0.0,), "data.eval_crop": 1.5, "data.on_bad_image": "skip",
    "data.value_range": (1, 1), "data.value_range ": (0,), "data.value_range  ": 255, "data.value_range   ": ("0", "1"),
    "data.value_range    ": (0, 10**400), "data.num_workers": -1, "data.eval_fraction": 1.01,
    "model.mask_ratio": 1.0, "model.mask_ratio ": 0.95, "model.patch_size": 3, "model.num_heads": 5,
    "model.decoder_num_heads": 3, "model.dtype": "float16", "model.image_size": "big", "model.depth": 0,
    "model.image_size ": 10**8, "model.width": 10**9, "model.depth ": 10**6, "model.mlp_ratio": 1e9,
    "model.scan_unroll": 10**9, "model.registers": 10**6, "data.num_workers ": 100_000, "data.prefetch_batches": 10**6,
    "data.num_examples": 10**21, "data.max_pixels": 10**12, "data.eval_crop ": 1e-9, "data.rand_augment_ops": 10**9,
    "data.mean ": ("a",), "data.std  ": (-58.4,), "data.bands": (0, 1), "data.bands ": (-1,),
    "data.bands  ": 2, "data.bands   ": ("a", "b", "c"), "data.mixup": 1e30,
    "classifier.num_classes": 10**9,
    "train.steps ": 10**20, "train.epochs  ": 1e300, "train.accumulate_steps": 65, "train.skip_nonfinite": 10**20,
    "train.profile_steps": 10**6, "optimizer.weight_decay": 1e39, "checkpoint.keep ": 10**20,
    "evaluate.batch_size": 10**10, "evaluate.knn_k": 10**6, "evaluate.pictures": 10**9, "evaluate.probe_c": 1e-300,
    "evaluate.knn_sweep_k": (1, 10**6), "evaluate.probe_sweep_c": (1e300,), "data.seed ": None,
    "evaluate.mask_ratio": 1.5, "checkpoint.every_steps": 0, "train.log_every_steps": 0, "evaluate.every_steps": 0,
}  # fmt: skip


def test_each_setting_with_a_range_exists_and_has_one():
    keys = [key for keys in RANGES.values() for key in keys.split()] + list(CHOICES)
    assert len(keys) == len(set(keys)) and set(keys) <= flatten(common.get_config().to_dict()).keys()


@pytest.mark.parametrize("key", BAD_VALUES)
def test_a_value_out_of_range_is_one_line_that_names_it(key):
    config, value = digits.get_config(), BAD_VALUES[key]
    with config.ignore_type(), pytest.raises(UserError) as error:
        config.update_from_flattened_dict({key.strip(): value})
        check_task(config)
    message = str(error.value)
    assert "\n" not in message
    assert key.strip().split(".")[-1].replace("_", " ") in message.replace("_", " ")


def test_the_regulariser_over_a_batch_is_refused_where_steps_see_parts_of_it():
    config = digits.get_config()
    config.model.uniformity = 0.01
    check_task(config)
    config.train.accumulate_steps = 2
    with pytest.raises(UserError, match="model.uniformity=0.01 .* set train.accumulate_steps=1"):
        check_task(config)


def test_a_classifiers_image_size_is_not_judged_by_a_patch_size_that_the_checkpoint_will_replace():
    config = finetune_vit_base.get_config()  # patches of 16 pixels
    config.model.image_size = (40, 24)
    with pytest.raises(UserError, match="patch size 16 does not divide the image size 40 x 24"):
        check_task(config)
    config.init_from = "runs/mine"
    check_task(config)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], "which config?"),
        (["--config=configs/digit.py"], 'did you mean "configs/digits.py"?'),
        (["--config=elsewhere/digits.py"], 'digits.py"?'),
        (["--config=configs/digits.py", "--config.model.widht=3"], 'did you mean "model.width"?'),
        (["--config=configs/digits.py", "--config.mask_ratio=0.5"], "mask_ratio"),
        (["--config=configs/digits.py", "--config.batch_size=5"], 'did you mean "data.batch_size"?'),
        (["--config", "configs/digits.py", "--noconfig.model.remta"], 'did you mean "model.remat"?'),
        (["--config=configs/digits.py", "--config.train=5"], "group of settings"),
        (["--config=configs/digits.py", "--config.checkpoint=runs/mine"], 'did you mean "init_from"?'),
        (["--config=README.md"], "not a Python file"),
        (["--config=digits"], 'did you mean "configs/digits.py"?'),
        (["--config=configs/mask_ratio.py"], 'did you mean "configs/ablations/mask_ratio.py"?'),
        (["--config=configs/nonesuch.py"], "there are: configs/"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_with_the_nearest_name(arguments, expected):
    with pytest.raises(UserError) as error:
        check_command_line(arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flag, hint",
    [
        ("batch_size", 'did you mean "--config.data.batch_size"?'),
        ("data.batch_size", 'did you mean "--config.data.batch_size"?'),
        ("output_dir", 'did you mean "--workdir"?'),
        ("dryrun", 'did you mean "--dry_run"?'),
        ("zzz", "settings are given as --config.KEY=VALUE"),
    ],
)
def test_a_flag_that_does_not_exist_is_told_with_the_setting_that_is_meant(flag, hint):
    assert describe_unknown_flag(flag, ["--config=configs/digits.py"]) == f"unknown flag --{flag}; {hint}"


def resolve_line(*arguments):
    return resolve(["--config=configs/digits.py", *arguments])


def keys_with_none():
    config = common.get_config()
    groups = {f"{name}.": config[name] for name in config if isinstance(config[name], ml_collections.ConfigDict)}
    for prefix, group in {"": config, **groups}.items():
        for name, value in group.items(preserve_field_references=True):
            if isinstance(value, FieldReference) and prefix + name not in ("data.name", "model.image_size", "shard"):
                yield prefix + name


@pytest.mark.parametrize("key", sorted(keys_with_none()))
def test_a_setting_that_may_be_none_can_be_none_on_the_command_line(key):
    assert get(resolve_line(f"--config.{key}=None"), key) is None


@pytest.mark.parametrize("key", ["data.seed", "data.flip", "optimizer.b1", "data.train_split", "mesh.data"])
def test_none_is_refused_where_a_value_is_needed(key):
    with pytest.raises(UserError, match=f"{key}=None: this setting needs a value"):
        resolve_line(f"--config.{key}=None")


@pytest.mark.parametrize(
    "setting, kind",
    [
        ("train.steps=1e20", "a whole number"), ("train.steps=1.5", "a whole number"), ("train.epochs=x", "a number"),
        ("data.flip=maybe", "True or False"), ("evaluate.knn_k=" + 5000 * "9", "a whole number"),
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_a_value_of_another_type_is_one_line_that_says_the_type(setting, kind):
    with pytest.raises(UserError, match=f"--config.{setting}: it must be {kind}"):
        resolve_line(f"--config.{setting}")


def test_of_a_value_and_none_the_last_one_counts():
    lines = ["--config.evaluate.every_steps=None", "--config.evaluate.every_steps=3"]
    assert resolve_line(*lines).evaluate.every_steps == 3
    assert resolve_line(*reversed(lines)).evaluate.every_steps is None


BEGIN = "from configs import common\ndef get_config():\n    config = common.get_config()\n"
BAD_CONFIGS = {
    BEGIN: "get_config() returns None, not a ConfigDict",
    "def get_config():\n    return {}\n": "get_config() returns a dict",
    BEGIN + "    config.train.steps = 1.5\n    return config\n": "line 4: TypeError",
    BEGIN + "    raise KeyError('gone')\n": "line 4: KeyError: 'gone'",
    BEGIN + "    raise ValueError('no such\\nthing')\n": "line 4: ValueError: no such",
    BEGIN + "    exit('early')\n": "line 4: SystemExit: early",
    BEGIN + "    return config[\n": "line 4: SyntaxError: '[' was never closed",
    BEGIN + "    import deeper\n": "deeper.py, line 2: SyntaxError",
    "import nonesuch\n": "line 1: ModuleNotFoundError: No module named 'nonesuch'",
    "raise RuntimeError\n": "line 1: RuntimeError",
    BEGIN + "    config.train.epoch = 3\n": 'line 4: there is no setting "epoch"; did you mean "train.epochs"?',
    BEGIN + "    del config.unlock().mesh\n    return config\n": "lacks settings (mesh.cpu_devices",
    BEGIN + "    config.unlock().model.widht = 3\n    return config\n": '"widht"; did you mean "model.width"?',
    BEGIN + "    config.train = {'steps': 'many'}\n    return config\n": "TypeError: Could not override field 'steps'",
    BEGIN.replace("()", "(size)", 1) + "    return config\n": "needs an argument after a colon",
    BEGIN + "    config.optimiser.lr = 3\n": 'line 4: there is no setting "optimiser"; did you mean "optimizer"?',
    BEGIN + "    config.train.batch = 3\n": 'there is no setting "batch"; did you mean "data.batch_size"?',
    "get_config = 3\n": "has no function get_config()",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_a_config_that_is_none_or_fails_is_one_line_that_names_the_file_and_the_line(text, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "deeper.py").write_text("\n1 +\n")
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        check_command_line([f"--config={tmp_path}/mine.py"])
    message = str(error.value)
    assert message.startswith(f"config {tmp_path}/mine.py") and BAD_CONFIGS[text] in message and "\n" not in message


def test_a_value_of_another_type_is_told_also_where_the_config_was_not_begun_with_ours(tmp_path):
    text = BEGIN + "    with config.ignore_type():\n        config.data.batch_size = 64.5\n    return config\n"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match="Could not override field 'batch_size' .*64.5"):
        check_command_line([f"--config={tmp_path}/mine.py"])


GOOD_CONFIGS = [
    "    return config.copy_and_resolve_references()\n",
    "    return type(config)(config.to_dict())\n",
    "    config.optimizer = config.optimizer.to_dict() | {'weight_decay': 0.1}\n    return config\n",
]


@pytest.mark.parametrize(
    "text",
    [*(BEGIN + end for end in GOOD_CONFIGS), BEGIN.replace("()", "(*names, **others)", 1) + "    return config\n",
     "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass Size:\n    width: int\n"
     + BEGIN + "    return config\n"],
)  # fmt: skip
def test_the_ways_in_which_people_write_configs_are_taken(text, tmp_path):
    (tmp_path / "mine.py").write_text(text)
    resolve([f"--config={tmp_path}/mine.py"])


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpshort", "--helpfull"])
def test_every_way_of_asking_for_help_is_known_and_settings_are_none(flag):
    assert asks_for_help([flag]) and asks_for_help(["--config=configs/digits.py", flag])
    assert not asks_for_help(["--config=configs/digits.py", "--workdir=help"])


def test_help_lists_the_configs_and_of_a_config_the_settings(tmp_path):
    for arguments in ([], ["--config=configs/nonesuch.py"]):
        text = describe_configs(arguments)
        assert "configs/digits.py" in text and "configs/ablations/mask_ratio.py" in text and "configs/common.py" in text
    text = describe_configs(["--config=configs/digits.py"])
    assert "handwritten digits" in text and "  --config.model.patch_size=2\n" in text
    lines = [line for line in text.splitlines() if line.startswith("  --config.")]
    copied = resolve_line(*(shlex.split(line)[0] for line in lines if "task" not in line))
    assert copied.model == resolve_line().model and copied.data == resolve_line().data


def test_a_right_command_line_passes():
    check_command_line(
        ["--config=configs/digits.py", "--config.train.steps=3", "--workdir=x", "--noconfig.model.remat"]
    )


def test_a_config_that_sets_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    text = "from configs import common\ndef get_config():\n    c = common.get_config()\n    c.train.epoch = 3\n"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        check_command_line([f"--config={tmp_path}/mine.py"])
    assert '"train.epochs"' in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_task_is_refused_with_the_nearest_name():
    config = common.get_config()
    config.task = "pretrian"
    with pytest.raises(UserError, match='did you mean "pretrain"'):
        check_task(config)


def test_flatten_and_from_dict_survive_json():
    import json

    config = ml_collections.ConfigDict(dict(a=dict(b=(1, 2), c=None), d="x")).to_dict()
    assert flatten(config) == {"a.b": [1, 2], "a.c": None, "d": "x"}
    assert from_dict(json.loads(json.dumps(config))) == config


def test_paths_may_start_at_home_and_may_be_missing(monkeypatch):
    monkeypatch.setenv("HOME", "/somebody")
    config = digits.get_config()
    config.data.path = "~/pictures"
    expand_paths(config)
    assert config.data.path == "/somebody/pictures" and config.init_from is None


def test_the_settings_given_on_a_command_line_are_known_by_their_keys():
    line = ["--config=configs/knn.py", "--config.model.image_size=224", "--workdir=x", "-config.data.mean=(0.5,)"]
    assert given_settings([*line, "--noconfig.model.remat"]) == ("model.image_size", "data.mean", "model.remat")
