"""Exported models, and runs that begin with, or measure, files of other programs."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import mae_jax
from mae_jax.interop.transfer import fitting_params
from mae_jax.interop.weights import read_weights
from mae_jax.interop.workdirs import find_checkpoint, read_config
from mae_jax.models.positions import sincos_table
from mae_jax.runtime.errors import UserError
from tests.interop.others import check_same_params, facebook_state, save_safetensors
from tests.runs import mistake, read_json, run_task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]  # has the programs of the runs it begins from

CARDS = {"huggingface": {"README.md"}}
FILES = {
    "huggingface": {"config.json", "preprocessor_config.json", "model.safetensors"},
    "timm": {"config.json", "model.safetensors"},
    "facebook": {"model.pth"},
}


@pytest.fixture(scope="module")
def exported(pretrained, finetuned, tmp_path_factory):
    """Exports (workdir, format, encoder only) to a folder, once each."""
    folders = {}

    def make(workdir, format, encoder_only=False):
        if format == "facebook":
            pytest.importorskip("torch")
        if (workdir, format, encoder_only) not in folders:
            folder = tmp_path_factory.mktemp("exported") / format
            settings = dict(init_from=str(workdir), format=format, encoder_only=encoder_only)
            folders[workdir, format, encoder_only] = run_task("export", folder, **settings)
        return folders[workdir, format, encoder_only]

    return make


def without_place(result):
    """A measurement without what names the files that were measured."""
    return {name: value for name, value in result.items() if name != "measured"}


@pytest.mark.parametrize("format", FILES)
@pytest.mark.parametrize("name", ["pretrained", "finetuned"])
def test_a_run_is_exported_with_its_weights_and_a_result_that_says_what_was_written(name, format, exported, request):
    workdir = request.getfixturevalue(name)
    folder = exported(workdir, format)
    result, weights = read_json(folder / "result.json"), read_weights(workdir)
    written = {file.name for file in folder.iterdir()} - {"result.json", "export.json"}
    assert set(result["files"]) == FILES[format] | CARDS.get(format, set()) == written
    assert (result["step"], result["init_from"], result["format"]) == (weights.step, str(workdir), format)
    expected = weights.params
    if (name, format) == ("pretrained", "timm"):  # whose models are encoders
        expected = {"encoder": expected["encoder"]}
        assert result["notes"] == ["timm's models are encoders: the decoder is left out"]
    assert result["parts"] == sorted(expected)
    if (name, format) == ("finetuned", "huggingface"):  # BEiT's keys have no bias; it has no influence
        expected["encoder"]["blocks"]["attention"]["qkv"]["bias"][:, 1] = 0
    check_same_params(read_weights(folder).params, expected)
    data = read_weights(folder).config["data"]
    assert (data["mean"], data["std"], data["eval_crop"]) == (
        weights.config["data"]["mean"], weights.config["data"]["std"], weights.config["data"]["eval_crop"]
    )  # fmt: skip


def test_an_export_of_a_classifier_gives_its_logits(finetuned, exported):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
    ours = mae_jax.load(finetuned)
    images = ours.processor(pictures)
    expected = jax.jit(ours.__call__)(images)
    for format in FILES:
        theirs = mae_jax.load(exported(finetuned, format))
        np.testing.assert_array_equal(theirs.processor(pictures), images)
        np.testing.assert_allclose(jax.jit(theirs.__call__)(images), expected, rtol=0, atol=1e-6)


def test_the_same_export_again_writes_the_same_files(pretrained, exported, tmp_path, capsys):
    folder = exported(pretrained, "huggingface")
    for _ in range(2):
        run_task("export", tmp_path, init_from=str(pretrained), format="huggingface")
        assert {file.name for file in tmp_path.iterdir()} == FILES["huggingface"] | {
            "README.md", "result.json", "export.json"
        }  # fmt: skip
        for name in FILES["huggingface"]:
            assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert f"{tmp_path}/model.safetensors  {(folder / 'model.safetensors').stat().st_size:,} bytes" in (
        capsys.readouterr().out
    )


def test_an_export_of_an_export_is_the_export(pretrained, exported, tmp_path):
    first = exported(pretrained, "facebook")
    again = run_task("export", tmp_path, init_from=str(first / "model.pth"), format="huggingface")
    expected = exported(pretrained, "huggingface")
    for name in FILES["huggingface"]:
        assert (again / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(format="hugingface"), "format='hugingface' is not one of huggingface, facebook, timm, stablehlo, onnx"),
        (dict(init_from="/nowhere"), "/nowhere does not exist"),
        (dict(init_from=None), "init_from is not set"),
    ],
)
def test_an_export_that_is_refused_writes_nothing(pretrained, tmp_path, settings, text):
    message = mistake("export", tmp_path / "run", **{"init_from": str(pretrained), **settings})
    assert text in message
    assert not list((tmp_path / "run").iterdir())


def test_an_export_that_is_refused_leaves_the_earlier_one(pretrained, tmp_path):
    run_task("export", tmp_path, init_from=str(pretrained), format="huggingface")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match="other than an earlier export as timm"):
        run_task("export", tmp_path, init_from=str(pretrained), format="timm")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_export_writes_into_an_empty_folder_only_and_never_over_its_source(pretrained, tmp_path):
    run_task("export", tmp_path / "first", init_from=str(pretrained))
    before = {file.name: file.read_bytes() for file in (tmp_path / "first").iterdir()}
    with pytest.raises(UserError, match="holds init_from"):
        run_task("export", tmp_path / "first", init_from=str(tmp_path / "first"), encoder_only=True)
    (tmp_path / "first" / "export.json").unlink()  # as of a model that came from elsewhere
    with pytest.raises(UserError, match=r"files other than an earlier export"):
        run_task("export", tmp_path / "first", init_from=str(pretrained))
    del before["export.json"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "first").iterdir()} == before


def test_an_export_into_the_workdir_of_a_training_run_is_refused(pretrained):
    before = {file.name for file in pretrained.iterdir()}
    with pytest.raises(UserError, match="belongs to a training run"):
        run_task("export", pretrained, init_from=str(pretrained))
    assert {file.name for file in pretrained.iterdir()} == before


# ----------------------------------------------------------------------------------- runs that begin with such a file


def test_fine_tuning_from_an_export_ends_as_from_the_run_itself(pretrained, finetuned, exported, tmp_path):
    folder = exported(pretrained, "huggingface")
    workdir = run_task("finetune_digits", tmp_path, init_from=str(folder), train__ema_decay=0.5)
    assert read_json(workdir / "result.json") == read_json(finetuned / "result.json")
    check_same_params(read_weights(workdir).params, read_weights(finetuned).params)


def test_pre_training_from_an_encoder_draws_a_decoder_and_says_so(pretrained, exported, tmp_path, capsys):
    folder = exported(pretrained, "facebook", encoder_only=True)
    settings = dict(optimizer__base_learning_rate=0.0, evaluate__evaluators=("loss",))
    run_task("digits", tmp_path, init_from=str(folder), train__steps=1, **settings)
    assert "the decoder starts from random weights" in capsys.readouterr().out
    found, before = read_weights(tmp_path).params, read_weights(pretrained).params
    check_same_params({"encoder": found["encoder"]}, {"encoder": before["encoder"]})
    kernels = [params["decoder"]["embed"]["kernel"] for params in (found, before)]
    assert 0.5 < np.std(kernels[0]) / np.sqrt(2 / 32) < 1.5  # Xavier's, from 16 to 16
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("format, encoder_only", [*((format, True) for format in FILES), ("huggingface", False)])
def test_pre_training_begins_with_the_weights_of_an_export_in_any_format(pretrained, exported, format, encoder_only):
    config = read_json(pretrained / "config.json")
    params, notes = fitting_params(read_weights(exported(pretrained, format, encoder_only)), config)
    expected = read_weights(pretrained).params
    check_same_params(params, {"encoder": expected["encoder"]} if encoder_only else expected)
    assert ("the decoder starts from random weights" in notes) == encoder_only


def test_pre_training_another_structure_is_refused_with_the_settings_named(pretrained, exported, tmp_path):
    folder = exported(pretrained, "huggingface")
    changes = dict(model__width=32, model__decoder_depth=2, model__activation="relu", model__qkv_bias=False)
    message = mistake("digits", tmp_path / "run", init_from=str(folder), **changes)
    for text in (
        "model.width=16 (here 32)", "model.decoder_depth=1 (here 2)", "model.activation='gelu' (here 'relu')",
        "model.qkv_bias=True (here False)",
    ):  # fmt: skip
        assert text in message
    assert "patch_size" not in message


def test_a_classifier_of_others_keeps_its_head_when_it_is_trained_on(finetuned, exported, tmp_path, capsys):
    folder = exported(finetuned, "facebook")
    run_task("finetune_digits", tmp_path, init_from=str(folder / "model.pth"), train__ema_decay=0.5)
    assert "with its head" in capsys.readouterr().out


# -------------------------------------------------------------------------------------- tasks that measure such a file


def test_the_loss_and_pictures_of_an_export_are_the_runs(pretrained, exported, tmp_path):
    expected = read_json(pretrained / "result.json")["eval/loss"]
    for name, format in (("evaluate", "huggingface"), ("reconstruct", "facebook")):
        folder = exported(pretrained, format)
        workdir = run_task(name, tmp_path / name, init_from=str(folder), data__name="digits")
        result = read_json(workdir / "result.json")
        assert (result["step"], result["images"]) == (40, 360)
        assert result["eval/loss"] == pytest.approx(expected, rel=1e-6)  # as of the workdir itself
        assert (workdir / "reconstructions" / "40.png").exists()


def test_pictures_of_anybody_are_reconstructed_without_data_to_be_named(pretrained, exported, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12), np.uint8)).save(tmp_path / "picture.png")
    workdir = run_task(
        "reconstruct",
        tmp_path / "run",
        init_from=str(exported(pretrained, "huggingface")),
        data__path=str(tmp_path / "picture.png"),
    )
    result = read_json(workdir / "result.json")
    assert result["images"] == 1 and result["measured"]["data.path"] == str(tmp_path / "picture.png")
    assert Image.open(workdir / "reconstructions" / "40.png").size[0] > 100


def test_the_accuracy_of_an_export_is_the_runs(finetuned, exported, tmp_path):
    expected = read_json(finetuned / "result.json")
    for format in FILES:
        workdir = run_task(
            "evaluate", tmp_path / format, init_from=str(exported(finetuned, format)), data__name="digits"
        )
        result = read_json(workdir / "result.json")
        assert (result["eval/top1"], result["eval/top5"]) == (expected["eval/top1"], expected["eval/top5"])
        assert result["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)


def test_the_neighbours_of_an_export_are_the_runs(pretrained, exported, tmp_path):
    settings = dict(evaluate__random_encoder=False, evaluate__knn_sweep_k=(1,))
    ours = run_task("knn", tmp_path / "ours", init_from=str(pretrained), **settings)
    expected = without_place(read_json(ours / "result.json"))
    for format in FILES:
        folder = exported(pretrained, format, encoder_only=format == "timm")
        workdir = run_task("knn", tmp_path / format, init_from=str(folder), data__name="digits", **settings)
        found = without_place(read_json(workdir / "result.json"))
        step = {} if format != "timm" else {"step": 40}  # of which timm's config.json says nothing
        assert found | step == expected


def test_which_pictures_must_be_said_for_a_file_of_others(pretrained, exported, tmp_path):
    folder = exported(pretrained, "huggingface")
    for name in ("knn", "evaluate", "reconstruct", "features"):
        message = mistake(name, tmp_path / name, init_from=str(folder))
        assert "does not say which pictures" in message and "--config.data.name=" in message


def test_an_encoder_is_measured_but_neither_evaluated_nor_reconstructed(pretrained, exported, tmp_path):
    folder = exported(pretrained, "facebook", encoder_only=True)
    for name in ("reconstruct", "evaluate"):
        message = mistake(name, tmp_path / name, init_from=str(folder), data__name="digits")
        assert "holds only an encoder: nothing can be reconstructed" in message and "visualize" in message


def test_settings_that_a_file_leaves_open_can_be_given_and_others_cannot(pretrained, exported, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.load(exported(pretrained, "facebook") / "model.pth", weights_only=True)["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    path, digits = str(tmp_path / "bare.pth"), dict(data__name="digits", data__mean=(0.305,), data__std=(0.376,))
    assert "does not say its num_heads" in mistake("evaluate", tmp_path / "a", init_from=path, **digits)
    heads = dict(assume__num_heads=2, assume__decoder_num_heads=2, assume__normalize_targets=False)
    result = run_task("evaluate", tmp_path / "b", init_from=path, data__eval_crop=1.0, **digits, **heads)
    expected = read_json(pretrained / "result.json")["eval/loss"]
    assert read_json(result / "result.json")["eval/loss"] == pytest.approx(expected, rel=1e-6)
    message = mistake("evaluate", tmp_path / "c", init_from=path, **digits, **heads, model__depth=3)
    assert "model.depth=3 is 2 in the checkpoint" in message


def test_a_setting_can_be_given_that_is_the_usual_one(tmp_path):
    path = save_safetensors(tmp_path / "model.safetensors", facebook_state(24, decoder=None))
    assert "does not say its num_heads" in mistake("export", tmp_path / "a", init_from=str(path))
    folder = run_task("export", tmp_path / "b", init_from=str(path), assume__num_heads=12)  # as ViT-B
    assert read_json(folder / "config.json")["num_attention_heads"] == 12


def test_how_pictures_are_prepared_can_be_given_to_an_export(pretrained, exported, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.load(exported(pretrained, "facebook") / "model.pth", weights_only=True)["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    settings = dict(assume__num_heads=2, assume__decoder_num_heads=2, data__mean=(0.3,), data__std=(0.4,))
    folder = run_task("export", tmp_path / "out", init_from=str(tmp_path / "bare.pth"), **settings)
    processor = read_json(folder / "preprocessor_config.json")
    assert (processor["image_mean"], processor["image_std"]) == ([0.3], [0.4])


def test_a_measurement_does_not_overwrite_the_files_of_an_export(pretrained, tmp_path):
    run_task("export", tmp_path, init_from=str(pretrained))
    before = (tmp_path / "config.json").read_bytes()
    for name in ("features", "digits", "finetune_digits"):
        with pytest.raises(UserError, match="holds weights, with a config.json of their own"):
            run_task(name, tmp_path, init_from=str(tmp_path), data__name="digits")
    assert (tmp_path / "config.json").read_bytes() == before


def test_what_a_file_leaves_open_can_be_said_to_training_too(pretrained, exported, tmp_path):
    torch = pytest.importorskip("torch")
    state = torch.load(exported(pretrained, "facebook") / "model.pth", weights_only=True)["model"]
    torch.save({"model": state}, tmp_path / "bare.pth")
    settings = dict(init_from=str(tmp_path / "bare.pth"))
    # The steps of `pretrained` and `finetuned`, so that nothing new is compiled.
    for name, others in (
        ("digits", dict(train__steps=40, evaluate__evaluators=("loss",))),
        ("finetune_digits", dict(train__ema_decay=0.5)),
    ):
        with pytest.raises(UserError, match="does not say its num_heads"):
            run_task(name, tmp_path / name, **settings, **others)
        run_task(name, tmp_path / name, assume__num_heads=2, assume__decoder_num_heads=2, **settings, **others)
        assert (tmp_path / name / "result.json").exists()


def test_the_notes_of_a_file_are_printed(pretrained, exported, tmp_path, capsys):
    folder = exported(pretrained, "facebook", encoder_only=True)
    run_task("features", tmp_path, init_from=str(folder), data__name="digits")
    assert f"note: {folder}: no decoder in it" in capsys.readouterr().out


def test_an_export_says_in_its_config_json_which_step_it_is_of(pretrained, exported):
    assert json.loads((exported(pretrained, "huggingface") / "config.json").read_text())["step"] == 40


def test_a_setting_of_the_command_line_counts_also_if_it_is_the_usual_one(exported, pretrained, tmp_path):
    folder = str(exported(pretrained, "huggingface"))  # whose pictures are not cropped
    for given, expected in (((), 1.0), (("data.eval_crop",), 0.875)):
        out = run_task("export", tmp_path / str(len(given)), init_from=folder, data__eval_crop=0.875, given=given)
        assert read_json(out / "preprocessor_config.json")["crop_pct"] == expected


def test_pre_training_with_learned_positions_begins_with_the_fixed_ones_of_another_run(pretrained):
    config = read_config(find_checkpoint(pretrained))[0]
    config = config | {"model": config["model"] | {"positions": "learned"}, "assume": {}}
    config["data"] = config["data"] | {"std": (0.5,)}
    params, notes = fitting_params(read_weights(pretrained), config)
    np.testing.assert_array_equal(params["encoder"]["positions"], sincos_table((4, 4), 16))
    assert params["decoder"]["positions"].shape == (17, 16)
    assert notes == [f"data.std was {read_weights(pretrained).config['data']['std']}, is (0.5,)"]
