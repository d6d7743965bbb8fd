"""Whole runs with the model's options, and with masks by hand."""

import contextlib
import io
import json
import shutil

import jax
import numpy as np
import pytest
from sklearn.decomposition import PCA

import mae_jax
from configs import digits
from mae_jax.data.augment import normalize
from mae_jax.data.sources import Digits
from mae_jax.interop.weights import read_weights
from tests.reference import loop_patches
from tests.runs import losses, mistake, read_json, run_task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]
LOSS = {"evaluate__evaluators": ("loss",)}
COMPONENTS = {"model__pca_targets": 3, "checkpoint__every_steps": 3, "train__log_every_steps": 1, **LOSS}
OPTIONS = {
    "model__class_tokens": 2, "model__registers": 2, "model__qk_norm": True, "model__decoder_attention": "cross",
    "model__prediction_ratio": 0.25, "model__masks_per_image": 2, "model__uniformity": 0.01, "model__mask_cell": 2,
    "evaluate__evaluators": ("loss", "knn"),
}  # fmt: skip


def images_of(split):
    """All images of a split of the digits as the runs here normalise them."""
    source = Digits(split)
    pictures = np.stack([source[i]["image"] for i in range(len(source))])
    return np.asarray(normalize(pictures, digits.get_config().data))


@pytest.fixture(scope="module")
def components(compile_once, one_device, tmp_path_factory):
    """A run whose targets are three principal components."""
    return run_task("digits", tmp_path_factory.mktemp("options") / "components", **COMPONENTS)


@pytest.fixture(scope="module")
def many_options(compile_once, one_device, tmp_path_factory):
    """A run with many options; what it said is in out.txt."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        workdir = run_task("digits", tmp_path_factory.mktemp("options") / "many", **OPTIONS)
    (workdir / "out.txt").write_text(out.getvalue())
    return workdir


def basis_of(path):
    return read_weights(path).params["decoder"]["basis"]


def test_the_basis_is_fitted_to_the_training_images_saved_and_never_trained(components):
    patches = loop_patches(images_of("train"), 2).reshape(-1, 4).astype(np.float64)
    pca = PCA(3, svd_solver="full").fit(patches)
    for step in (3, 6):
        basis = basis_of(components / "checkpoints" / str(step))
        np.testing.assert_allclose(basis["mean"], pca.mean_, rtol=0, atol=1e-6)
        signs = np.sign(np.sum(basis["components"] * pca.components_, axis=1, keepdims=True))
        # Normalised pixels have 1e-7 of their values; the variances lie well apart.
        np.testing.assert_allclose(basis["components"] * signs, pca.components_, rtol=0, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, basis, basis_of(components / "checkpoints" / "3"))
    for part in ("params", "opt_state"):
        assert not list((components / "checkpoints" / "6" / part).glob("*basis*"))


def test_a_run_with_components_goes_on_with_the_same_basis_and_losses(components, tmp_path):
    again = shutil.copytree(components, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "6")
    (again / "result.json").unlink()
    run_task("digits", again, **COMPONENTS)
    assert losses(again) == losses(components)
    jax.tree.map(np.testing.assert_array_equal, read_weights(again).params, read_weights(components).params)
    ours, theirs = (read_json(folder / "result.json") for folder in (again, components))
    assert ours["eval/loss"] == theirs["eval/loss"]


def test_a_run_that_begins_with_components_keeps_their_basis_and_with_an_encoder_alone_fits_one(components, tmp_path):
    # Pictures normalised otherwise would give another basis.
    kept = run_task("digits", tmp_path / "kept", init_from=str(components), **COMPONENTS, data__mean=(0.1,))
    jax.tree.map(np.testing.assert_array_equal, basis_of(kept), basis_of(components))
    encoder = run_task("export", tmp_path / "encoder", init_from=str(components), format="facebook", encoder_only=True)
    fitted = run_task("digits", tmp_path / "fitted", init_from=str(encoder), **COMPONENTS)
    jax.tree.map(np.testing.assert_array_equal, basis_of(fitted), basis_of(components))


def test_options_train_report_their_parts_and_are_named(many_options):
    lines = [json.loads(line) for line in (many_options / "metrics.jsonl").read_text().splitlines()]
    line = next(line for line in lines if "train/uniformity" in line)
    assert 0 < line["train/uniformity"] <= 1
    expected = line["train/reconstruction_loss"] + 0.01 * line["train/uniformity"]
    assert line["train/loss"] == pytest.approx(expected, rel=1e-5)
    out = (many_options / "out.txt").read_text()
    for name, value in (("mask_cell", 2), ("class_tokens", 2), ("prediction_ratio", 0.25), ("uniformity", 0.01)):
        assert f"{name} {value}" in out


@pytest.mark.parametrize("pool", ["class", "mean_norm"])
def test_a_classifier_begins_with_the_class_tokens_and_registers_of_its_checkpoint(many_options, pool, tmp_path):
    settings = dict(init_from=str(many_options), classifier__pool=pool, train__steps=2)
    before = read_weights(many_options).params["encoder"]
    assert before["class_token"].shape == before["registers"].shape == (1, 2, 16)
    tuned = read_weights(run_task("finetune_digits", tmp_path / "tuned", **settings)).params["encoder"]
    assert all(np.abs(tuned[name] - before[name]).max() > 0 for name in ("class_token", "registers"))


def test_a_frozen_encoder_keeps_its_class_tokens_registers_and_norms_at_another_size_too(many_options, tmp_path):
    settings = dict(classifier__trained_blocks=0.0, train__steps=2, model__image_size=10)
    frozen = run_task("finetune_digits", tmp_path / "probe", init_from=str(many_options), **settings)
    before, after = (read_weights(path).params["encoder"] for path in (many_options, frozen))
    for name in ("class_token", "registers"):
        np.testing.assert_array_equal(after[name], before[name])
    np.testing.assert_array_equal(*(p["blocks"]["attention"]["q_norm"]["scale"] for p in (before, after)))
    assert read_json(frozen / "config.json")["model"]["mask_cell"] == 1  # 2 does not divide 5 patches


# --------------------------------------------------------------------------------------------------- masks by hand


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Masks of 360 digits' 4 x 4 patches, each its own, as an array in a file and as a function."""
    folder = tmp_path_factory.mktemp("masks")
    np.save(folder / "masks.npy", (np.random.default_rng(0).random((360, 16)).argsort(1) < 10).reshape(360, 4, 4))
    (folder / "masks.py").write_text(
        "import numpy as np\n\n\ndef hide(number, grid):\n"
        "    return np.roll(np.arange(16) < 10, number).reshape(grid)\n\n\ndef fails(number, grid):\n    return 1 / 0\n"
    )
    return folder


@pytest.mark.parametrize(
    "name, task",
    [
        ("pretrained", "reconstruct"),
        ("pretrained", "evaluate"),
        ("components", "evaluate"),
        ("many_options", "reconstruct"),
    ],
)
def test_the_loss_under_masks_by_hand_is_that_of_the_loaded_model(task, name, masks, tmp_path, request):
    trained = request.getfixturevalue(name)
    if task == "reconstruct":
        given, mask = f"{masks}/masks.npy", np.load(masks / "masks.npy")
    else:
        given, mask = f"{masks}/masks.py:hide", lambda number, grid: np.roll(np.arange(16) < 10, number)
    workdir = run_task(task, tmp_path / "out", init_from=str(trained), evaluate__mask=given, evaluate__batch_size=96)
    output = mae_jax.load(trained)(images_of("eval"), mask=mask)
    found = read_json(workdir / "result.json")
    assert found["images"] == 360 and output.mask.sum() == 3600
    # A mean of 360 float32 losses.
    assert found["eval/loss"] == pytest.approx(float(output.loss), rel=1e-5)
    assert list((workdir / "reconstructions").glob("*.png"))


def test_masks_by_hand_may_be_those_of_the_evaluation_while_training(masks, tmp_path):
    workdir = run_task("digits", tmp_path / "run", evaluate__mask=f"{masks}/masks.npy", train__steps=40, **LOSS)
    output = mae_jax.load(workdir)(images_of("eval"), mask=np.load(masks / "masks.npy"))
    assert read_json(workdir / "result.json")["eval/loss"] == pytest.approx(float(output.loss), rel=1e-5)


def test_masks_that_cannot_be_used_are_refused_before_anything_runs(pretrained, masks, tmp_path):
    settings = {"init_from": str(pretrained)}
    for task in ("reconstruct", "evaluate"):
        assert "No such file" in mistake(task, tmp_path / task, **settings, evaluate__mask="none.npy")
        message = mistake(task, tmp_path / task, **settings, evaluate__mask=f"{masks}/masks.py:fails")
        assert "cannot be used (ZeroDivisionError: division by zero)" in message
        fewer = mistake(
            task, tmp_path / task, **settings, evaluate__mask=f"{masks}/masks.npy", evaluate__max_examples=9
        )
        assert "mask of shape (360, 4, 4)" in fewer
    both = mistake("evaluate", tmp_path / "both", **settings, evaluate__mask="a.npy", evaluate__mask_ratio=0.5)
    assert "evaluate.mask_ratio=0.5 cannot be given with evaluate.mask=a.npy" in both
    assert "cannot be used" in mistake("digits", tmp_path / "train", evaluate__mask="none.npy")
