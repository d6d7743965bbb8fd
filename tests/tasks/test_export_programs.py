"""Exports of whole runs: programs that need this package no longer, and model cards."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

import mae_jax
from mae_jax.interop.formats import PROGRAMS
from tests.runs import ROOT, read_json, run_task

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


@pytest.fixture(scope="module")
def hub(finetuned, tmp_path_factory):
    """A Hugging Face export of the fine-tuned run."""
    return run_task("export", tmp_path_factory.mktemp("hub"), init_from=str(finetuned), format="huggingface")


@pytest.mark.parametrize("format", PROGRAMS)
def test_the_loader_in_the_docs_names_the_class_that_the_model_names_without_this_package(
    finetuned, tmp_path, format, monkeypatch
):
    pytest.importorskip("onnxruntime")
    folder = run_task("export", tmp_path / "export", init_from=str(finetuned), format=format)
    assert set(read_json(folder / "result.json")["files"]) == {
        f"encoder.{format}",
        f"classifier.{format}",
        "about.json",
    }
    digit = np.uint8(sklearn.datasets.load_digits().images[5] * 255 / 16)
    picture = Image.fromarray(digit).resize((40, 50), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "digit.png")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "use.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "about.json" in block and "stablehlo" in block]
    if format == "onnx":
        code = re.sub(r"^run = .*\n", "", code, flags=re.M)
        code = re.sub(r"^logits = .*\n", _onnx_lines(blocks), code, flags=re.M)
    for old, new in {"FOLDER": str(folder), "PICTURE": str(tmp_path / "digit.png"), '"RGB"': '"L"'}.items():
        assert old in code
        code = code.replace(old, new)
    code = code.replace("np.asarray(picture)[None]", "np.asarray(picture)[None, ..., None]")  # grey
    code += "\nprint(json.dumps(np.asarray(logits).tolist()))\nimport sys\nassert 'mae_jax' not in sys.modules\n"
    command = [sys.executable, "-P", "-c", code]
    monkeypatch.delenv("PYTHONPATH", raising=False)
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    model = mae_jax.load(finetuned)
    expected = np.asarray(model(model.processor(tmp_path / "digit.png")))
    np.testing.assert_allclose(json.loads(printed[1]), expected, atol=1e-4)
    assert printed[0] == model.class_names[expected[0].argmax()]


def _onnx_lines(blocks):
    (block,) = [block for block in blocks if "onnxruntime" in block]
    return "".join(line + "\n" for line in block.splitlines() if not line.startswith("#"))


def test_an_export_of_less_leaves_no_earlier_program_beside_it(pretrained, tmp_path):
    run_task("export", tmp_path, init_from=str(pretrained), format="onnx")
    assert (tmp_path / "reconstruction.onnx").exists()
    run_task("export", tmp_path, init_from=str(pretrained), format="onnx", encoder_only=True)
    assert {file.name for file in tmp_path.iterdir()} == {"encoder.onnx", "about.json", "result.json", "export.json"}


def test_a_card_tells_data_settings_scores_and_use_and_its_code_runs(finetuned, hub, monkeypatch):
    transformers = pytest.importorskip("transformers")
    card, result = (hub / "README.md").read_text(), read_json(finetuned / "result.json")
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-classification\n")
    for row in ("| data | digits |", f"| eval/top1 | {result['eval/top1']:.4g} |", "| average of the weights | 0.5 |"):
        assert row in card
    assert str(finetuned.parent) not in card  # no folder of the user's
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    path = hub / "grey.png"
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(path)
    scope = {}
    exec(code.replace("FOLDER", str(hub)).replace("PICTURE", str(path)), scope)
    path.unlink()
    assert scope["outputs"].logits.shape == (1, 10)
    assert isinstance(scope["model"], transformers.BeitForImageClassification)
    assert list(scope["model"].config.id2label.values()) == list(mae_jax.load(hub).class_names)


def test_a_card_is_renewed_but_not_if_someone_has_changed_it(pretrained, tmp_path, capsys):
    run_task("export", tmp_path, init_from=str(pretrained), format="huggingface")
    card = tmp_path / "README.md"
    run_task("export", tmp_path, init_from=str(pretrained), format="huggingface", encoder_only=True)
    assert "ViTModel.from_pretrained" in card.read_text() and "README.md is not" not in capsys.readouterr().out
    assert "README.md" in read_json(tmp_path / "result.json")["files"]
    card.write_text(card.read_text() + "\nMy own words.\n")
    for _ in range(2):
        run_task("export", tmp_path, init_from=str(pretrained), format="huggingface")
        assert "README.md is not an export's own, or was changed: it is left as it is" in capsys.readouterr().out
        assert "My own words." in card.read_text() and "ViTModel.from_pretrained" in card.read_text()
        assert "README.md" not in read_json(tmp_path / "result.json")["files"]
