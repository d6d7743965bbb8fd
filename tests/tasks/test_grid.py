"""What an ablation runs, worked out from its settings."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import common
from configs.ablations import base as bases
from mae_jax.runtime.errors import UserError
from mae_jax.settings.command_line import check_command_line, config_file
from mae_jax.settings.fields import flatten, from_dict
from mae_jax.tasks.ablation.grid import make_cells, parse_grid, parse_shard, safe_name
from mae_jax.tasks.ablation.jobs import make_plan, resolve

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(path.stem for path in Path("configs/ablations").glob("*.py") if path.stem not in ("__init__", "base"))
FINETUNE = ("finetune", "finetune_digits", (("train.epochs", 20.0),))
PROBE = ("probe", "linear_probe_digits", ())


def make_config(file="configs/ablations/mask_ratio.py", **ablate):
    """An ablation of the digits as main.py hands it to its task."""
    config = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config()
    config.file = str(Path(file).absolute())
    ablate = {"seeds": (0,), "scores": ("eval/loss",), "plot": (), "measure": ()} | ablate
    config.shard = ablate.pop("shard", None)
    config.ablate.update(ablate)
    return config


def plan_of(**ablate):
    return make_plan(make_config(**ablate), Path("/nowhere"))


def mistake(**ablate) -> str:
    with pytest.raises(UserError) as error:
        plan_of(**ablate)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_cells_are_the_product_of_the_axes_and_the_last_one_changes_fastest():
    cells = make_cells(parse_grid((("model.mask_ratio", (0.5, 0.75)), ("model.depth", (1, 2)))))
    assert [cell.name for cell in cells] == [
        "mask_ratio 0.5, depth 1", "mask_ratio 0.5, depth 2", "mask_ratio 0.75, depth 1", "mask_ratio 0.75, depth 2",
    ]  # fmt: skip
    assert cells[2].settings == {"model.mask_ratio": 0.75, "model.depth": 1}


def test_keys_of_one_axis_change_together():
    cells = make_cells(parse_grid(((("model.width", "model.num_heads"), ((16, 2), (32, 4)), ("thin", "wide")),)))
    assert [(cell.name, cell.settings) for cell in cells] == [
        ("thin", {"model.width": 16, "model.num_heads": 2}),
        ("wide", {"model.width": 32, "model.num_heads": 4}),
    ]


def test_two_keys_that_end_alike_are_told_apart():
    axes = parse_grid((("model.mask_ratio", (0.5,)), ("evaluate.mask_ratio", (0.75,))))
    assert [axis.title for axis in axes] == ["model.mask_ratio", "evaluate.mask_ratio"]


@given(st.text(max_size=40))
def test_every_name_becomes_a_part_of_a_path_that_is_no_step_upwards(name):
    folder = safe_name(name)
    assert folder not in ("", ".", "..") and not set(folder) & set('/\\:*?"<>| \n\0')


def test_names_that_would_share_a_folder_are_refused():
    axis = ("model.depth", (1, 2), ("a/b", "A b"))
    assert "would share the folder" in mistake(grid=(axis,))


def test_cells_that_differ_only_in_how_they_are_measured_share_their_pretraining():
    plan = plan_of(
        grid=(("model.mask_ratio", (0.5, 0.75)), ("finetune.classifier.trained_blocks", (0.0, 1.0, None))),
        measure=(FINETUNE, PROBE),
    )
    assert len(plan.cells) == 6
    names = [run.name for run in plan.runs]
    assert (names.count("pretrain"), names.count("finetune"), names.count("probe")) == (2, 6, 2)
    head = plan.needed["mask_ratio 0.5, trained_blocks 0.0", 0][1]
    assert head.config.classifier.trained_blocks == 0 and head.config.train.epochs == 20
    assert head.after == plan.needed["mask_ratio 0.5, trained_blocks None", 0][0].folder
    assert head.config.init_from == str(head.after)
    for run in plan.runs:  # nothing is measured before it is there
        assert run.after is None or plan.runs.index(run) > [other.folder for other in plan.runs].index(run.after)


def test_the_command_of_a_run_is_read_back_as_the_settings_of_its_cell():
    config = make_config(grid=(
        (("data.crop_scale", "model.image_size", "model.remat", "data.crop_rule", "optimizer.base_learning_rate"),
         (((0.5, 1.0), (8, 16), True, "centre", 3e-05),)), ("train.steps", (7, None)),
    ), measure=(FINETUNE,), seeds=(3,))  # fmt: skip
    config.given = ("data.name", "data.path", "data.mean", "ablate.seeds")
    config.data.update(name="image_folder", path="/some where/a,b", mean=(0.25,))
    plan = make_plan(config, Path("/nowhere"))
    one = plan.runs[0].config
    assert (one.task, one.seed, one.data.seed, one.train.steps) == ("pretrain", 3, 3, 7)
    assert one.data.crop_scale == (0.5, 1.0) and one.model.image_size == (8, 16) and one.model.remat is True
    assert one.data.crop_rule == "centre" and one.optimizer.base_learning_rate == 3e-05
    assert one.data.path == "/some where/a,b" and one.data.mean == (0.25,)
    assert plan.runs[1].config.data.path == "/some where/a,b", "the protocol finds the pictures too"
    assert plan.runs[2].config.train.steps is None
    assert resolve(plan.runs[0].arguments).to_dict() == one.to_dict()


def test_none_is_given_to_a_run_whose_config_has_a_value_and_refused_where_a_value_is_needed():
    plan = plan_of(grid=(("evaluate.max_train_examples", (100, None)),))
    assert [run.config.evaluate.max_train_examples for run in plan.runs] == [100, None]
    assert "cell 'depth None': model.depth=None" in mistake(grid=(("model.depth", (None,)),))


RATIO = ("model.mask_ratio", (0.5, 0.75))


@pytest.mark.parametrize(
    "ablate, expected",
    [
        (dict(grid=()), "ablate.grid is empty"),
        (dict(grid=RATIO), "has 'model.mask_ratio', which is not an axis"),
        (dict(grid=(("model.mask_ratio", ()),)), "which is not an axis (key, values)"),
        (dict(grid=(("model.mask_ratio", 0.5),)), "which is not an axis (key, values)"),
        (dict(grid=(("model.mask_ratio", (0.5, 0.5)),)), "(0.5, 0.5)), which is not an axis"),
        (dict(grid=(("model.mask_ratio", (0.5, 0.75), ("a", "a")),)), "as many names as values, none twice"),
        (dict(grid=(("model.mask_ratio", (0.5, 0.75), ("a",)),)), "as many names as values"),
        (dict(grid=((("model.width", "model.depth"), ((16, 2), (3,))),)), "in each value one for each of several keys"),
        (dict(grid=(RATIO, RATIO)), "model.mask_ratio twice"),
        (dict(grid=(("seed", (1, 2)),)), "set ablate.seeds"),
        (dict(grid=(("model.mask_ration", (0.5,)),)), 'did you mean "model.mask_ratio"?'),
        (dict(grid=(("finetun.train.epochs", (1,)),), measure=(FINETUNE,)), 'did you mean "finetune.train.epochs"?'),
        (dict(grid=(("model.mask_ratio", (0.5, 1.5)),)), "cell 'mask_ratio 1.5': model.mask_ratio=1.5"),
        (dict(grid=(("model.depth", (2.5,)),)), "cell 'depth 2.5'"),
        (dict(grid=(("finetune.optimizer.name", ("sgd",)),), measure=(FINETUNE,)), "optimizer.name='sgd'"),
        (dict(grid=(RATIO,), measure=(("finetune", "finetune_digit", ()),)), 'finetune_digits.py"?'),
        (dict(grid=(RATIO,), measure=(("finetune", "finetune_digits"),)), "not (name, config, overrides)"),
        (dict(grid=(RATIO,), measure=(("model", "finetune_digits", ()),)), "'model', which is taken"),
        (dict(grid=(RATIO,), measure=(FINETUNE, FINETUNE)), "'finetune', which is taken"),
        (dict(grid=(RATIO,), measure=(("x", "export", ()),)), "has the task export"),
        (dict(grid=(RATIO,), measure=(("x", "finetune_digits", (("train.epoch", 1),)),)), "train.epoch"),
        (dict(grid=(RATIO,), scores=("finetune/top1",)), "no run measures 'finetune/top1'"),
        (dict(grid=(RATIO,), scores=(5,)), "no run measures 5"),
        (dict(grid=(RATIO,), measure=(FINETUNE,), plot=("finetune/top2",)), "no run measures 'finetune/top2'"),
        (dict(grid=(RATIO,), seeds=()), "ablate.seeds=()"),
        (dict(grid=(RATIO,), shard="4/3"), "shard=4/3 is not i/n"),
        (dict(grid=(RATIO,), shard="one"), "shard=one is not i/n"),
        (dict(grid=(RATIO,), shard="0/0"), "shard=0/0 is not i/n"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_value_and_the_cell(ablate, expected):
    assert expected in mistake(**ablate)


@given(st.integers(1, 9), st.integers(0, 1), st.integers(1, 30))
def test_shards_counted_from_0_or_from_1_cover_everything_exactly_once(count, first, runs):
    places = [parse_shard(f"{i}/{count}") for i in range(first, count + first)]
    made = [run for index, of in places for run in range(runs) if run % of == index]
    assert sorted(made) == list(range(runs))


def test_cells_that_share_their_pretraining_are_in_one_shard():
    blocks = ("finetune.classifier.trained_blocks", (0.0, 1.0))
    settings = dict(grid=(RATIO, blocks), measure=(FINETUNE,), seeds=(0, 1))
    shards = [plan_of(**settings, shard=f"{i}/3").own for i in (1, 2, 3)]
    assert sorted(len(shard) for shard in shards) == [3, 3, 6]
    everything = [run.folder for run in plan_of(**settings).runs]
    assert sorted(run.folder for shard in shards for run in shard) == sorted(everything)
    for shard in shards:
        assert all(run.after in [None, *(other.folder for other in shard)] for run in shard)


@pytest.mark.parametrize("base", bases.PROTOCOLS)
@pytest.mark.parametrize("name", FILES)
def test_every_cell_of_every_ablation_has_settings_that_pass_their_checks(name, base):
    module = importlib.import_module(f"configs.ablations.{name}")
    assert f"--config=configs/ablations/{name}.py" in module.__doc__
    if name == "partial_finetuning" and not any(protocol[0] == "finetune" for protocol in bases.PROTOCOLS[base]):
        return
    config = module.get_config(base)
    assert flatten(config.to_dict()).keys() == flatten(common.get_config().to_dict()).keys()
    config.file = f"{Path(module.__file__)}:{base}"
    plan = make_plan(config, Path("/nowhere"))
    assert all(len(points) > 1 for _, points in config.ablate.paper)
    for run in plan.runs:
        assert run.config.data.name in (config.data.name, None), "what is measured is what was pre-trained on"


def test_the_mask_ratios_of_the_digits_hide_different_numbers_of_patches():
    ((_, ratios),) = make_config().ablate.grid
    assert len({int(16 * (1 - ratio)) for ratio in ratios}) == len(ratios) >= 5
    assert np.all(np.diff(ratios) > 0)


def test_a_base_is_named_after_a_colon_and_an_unknown_one_is_told_with_those_that_are_known():
    arguments = ["--config=configs/ablations/mask_ratio.py:vit_large"]
    check_command_line(arguments)
    assert config_file(arguments) == (Path("configs/ablations/mask_ratio.py"), "vit_large")
    assert resolve(arguments).model.depth == 24
    with pytest.raises(UserError, match="unknown base 'cifar'; did you mean \"cifar10\".*vit_huge"):
        check_command_line(["--config=configs/ablations/mask_ratio.py:cifar"])
    with pytest.raises(UserError, match="takes nothing after a colon"):
        check_command_line(["--config=configs/digits.py:large"])


def test_a_grid_survives_json_and_the_command_line():
    config = make_config(measure=(FINETUNE,))
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config.to_dict()
    grid = (("model.mask_ratio", (0.5, None)), (("model.width", "data.name"), ((16, "a b"),), ("x",)))
    arguments = ["--config=configs/ablations/mask_ratio.py", f"--config.ablate.grid={grid}"]
    read = resolve([*arguments, "--config.ablate.seeds=(0,1,2)", f"--config.ablate.measure={(FINETUNE,)}"]).ablate
    assert (read.grid, read.seeds, read.measure) == (grid, (0, 1, 2), (FINETUNE,))


def test_what_the_command_sets_and_the_grid_varies_is_refused():
    config = make_config(grid=(("model.mask_ratio", (0.5, 0.75)),))
    config.given = ("model.mask_ratio",)
    with pytest.raises(UserError, match="--config.model.mask_ratio is what ablate.grid varies"):
        make_plan(config, Path("/nowhere"))


@pytest.mark.parametrize("key", ["seed", "init_from", "task", "ablate.title"])
def test_what_an_ablation_sets_itself_is_no_protocols_setting(key):
    grid = (("model.mask_ratio", (0.5,)),)
    assert "which the ablation sets itself" in mistake(grid=((f"finetune.{key}", ("a", "b")),), measure=(FINETUNE,))
    assert "which the ablation sets itself" in mistake(grid=grid, measure=((*FINETUNE[:2], ((key, 1),)),))


def test_values_that_are_equal_are_one_cell_however_they_are_written():
    assert "100.0" in mistake(grid=(("train.epochs", (100, 100.0)),))


def test_more_trained_blocks_than_the_encoder_has_are_refused_before_anything_is_trained():
    grid = (("finetune.classifier.trained_blocks", (1.0, 99.0)),)
    assert "is more than model.depth=4" in mistake(grid=grid, measure=(FINETUNE,))


def test_a_cell_whose_name_no_folder_can_have_is_refused():
    assert "too long" in mistake(grid=(("init_from", ("a" * 300,)),))


def test_measuring_runs_take_the_pictures_that_the_command_names():
    config = make_config(grid=(("model.mask_ratio", (0.5,)),), measure=(FINETUNE,))
    config.given = ("data.name", "data.num_examples", "data.value_range")
    config.data.update(name="synthetic", num_examples=64, value_range=(0, 4095))
    runs = make_plan(config, Path("/nowhere")).runs
    assert [run.config.data.name for run in runs] == ["synthetic", "synthetic"]
    assert [run.config.data.value_range for run in runs] == [(0, 4095), (0, 4095)]


def test_what_the_named_pictures_do_not_use_is_not_handed_to_measuring_runs():
    config = make_config(grid=(("model.mask_ratio", (0.5,)),), measure=(("neighbours", "knn", ()),))
    config.file += ":cifar10"  # which has data.eval_split=test, that digits refuse on a command line
    config.given, config.data.name = ("data.name",), "digits"
    assert make_plan(config, Path("/nowhere")).runs[1].config.data.name == "digits"


def test_the_configs_for_any_checkpoint_can_measure_too():
    runs = plan_of(grid=(("model.mask_ratio", (0.5,)),), measure=(("tuned", "finetune", ()),)).runs
    assert runs[1].config.data.name is None and runs[1].config.init_from == str(runs[0].folder), "its own pictures"
