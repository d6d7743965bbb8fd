import importlib
from pathlib import Path

import ml_collections
import pytest

from configs import common, digits, finetune_vit_base
from mae_jax.command_line import check_command_line, given_settings
from mae_jax.config import check, expand_paths, flatten, from_dict, nearest
from mae_jax.errors import UserError
from mae_jax.tasks import TASKS, find_task

NAMES = sorted(path.stem for path in Path("configs").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_every_config_passes_its_own_checks_and_names_a_task_and_its_command(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    check(config)
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
    "data.batch_size": 0, "train.steps": 0, "train.epochs": 0.0, "train.epochs ": float("inf"),
    "optimizer.base_learning_rate": -1.0, "optimizer.base_learning_rate ": float("nan"), "optimizer.b2": 1.0,
    "optimizer.clip_norm": 0.0, "optimizer.muon_momentum": 1.0, "optimizer.name": "moun", "checkpoint.keep": 0,
    "evaluate.token": "cls", "evaluate.knn_temperature": 0.0, "data.seed": -1, "seed": 2**32,
    "data.crop_scale": (0.5, 1.5), "data.crop_ratio": (2.0, 1.0), "data.crop_scale ": (0.2,), "data.std ": ("a",),
    "data.mean": (0.5, 0.5), "data.std": (0.0,), "data.eval_crop": 1.5, "data.on_bad_image": "skip",
    "data.num_workers": -1, "data.eval_fraction": 1.0,
    "model.mask_ratio": 1.0, "model.mask_ratio ": 0.95, "model.patch_size": 3, "model.num_heads": 5,
    "model.decoder_num_heads": 3, "model.dtype": "float16", "model.image_size": "big", "model.depth": 0,
    "evaluate.mask_ratio": 1.5, "checkpoint.every_steps": 0, "train.log_every_steps": 0, "evaluate.every_steps": 0,
}  # fmt: skip


@pytest.mark.parametrize("key", BAD_VALUES)
def test_a_value_out_of_range_is_one_line_that_names_it(key):
    config, value = digits.get_config(), BAD_VALUES[key]
    with config.ignore_type(), pytest.raises(UserError) as error:
        config.update_from_flattened_dict({key.strip(): value})
        check(config)
    message = str(error.value)
    assert "\n" not in message
    assert key.strip().split(".")[-1].replace("_", " ") in message.replace("_", " ")


def test_the_regulariser_over_a_batch_is_refused_where_steps_see_parts_of_it():
    config = digits.get_config()
    config.model.uniformity = 0.01
    check(config)
    config.train.accumulate_steps = 2
    with pytest.raises(UserError, match="model.uniformity=0.01 .* set train.accumulate_steps=1, not 2"):
        check(config)


def test_a_classifiers_image_size_is_not_judged_by_a_patch_size_that_the_checkpoint_will_replace():
    config = finetune_vit_base.get_config()  # patches of 16 pixels
    config.model.image_size = (40, 24)
    with pytest.raises(UserError, match="patch size 16 does not divide the image size 40 x 24"):
        check(config)
    config.init_from = "runs/mine"
    check(config)


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
        (["--config=README.md"], "not a Python file"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_with_the_nearest_name(arguments, expected):
    with pytest.raises(UserError) as error:
        check_command_line(arguments)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_right_command_line_passes():
    check_command_line(
        ["--config=configs/digits.py", "--config.train.steps=3", "--workdir=x", "--noconfig.model.remat"]
    )


def test_a_config_that_sets_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    text = "from configs import common\ndef get_config():\n    c = common.get_config()\n    c.train.epoch = 3\n"
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError) as error:
        check_command_line([f"--config={tmp_path}/mine.py"])
    assert '"epochs"' in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match='did you mean "pretrain"'):
        find_task("pretrian")


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


def test_nothing_is_suggested_where_nothing_is_near():
    assert nearest("zzz", ["digits", "synthetic"]) == ""


def test_the_settings_given_on_a_command_line_are_known_by_their_keys():
    line = ["--config=configs/knn.py", "--config.model.image_size=224", "--workdir=x", "-config.data.mean=(0.5,)"]
    assert given_settings([*line, "--noconfig.model.remat"]) == ("model.image_size", "data.mean", "model.remat")
