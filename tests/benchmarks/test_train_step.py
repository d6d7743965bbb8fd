import json
import sys

import pytest

from benchmarks import train_step
from benchmarks.jax_step import JaxStep
from benchmarks.train_step import parse_setting, summary


def test_the_summary_is_what_a_hand_computes_and_the_ratio_is_to_the_fastest_other():
    ours = {"images_per_second": 300.0, "flops": 10**9, "matmul_tflops": 0.5}
    assert summary({"mae_jax": ours}) == pytest.approx(
        {"images_per_second": 300.0, "tflops_per_second": 0.3, "matmul_share": 0.6}
    )
    others = {"torch": {"images_per_second": 100.0}, "torch.compile": {"images_per_second": 150.0}}
    found = summary({"mae_jax": ours} | others)
    assert (found["torch_images_per_second"], found["ratio"]) == (150.0, 2.0)


def test_settings_are_read_as_what_they_look_like():
    texts = ("model.remat=True", "model.depth=3", "model.mask_ratio=0.5", "model.attention=cudnn", "a.b=[1, 2]")
    assert [parse_setting(text)[1] for text in texts] == [True, 3, 0.5, "cudnn", [1, 2]]


class QuickJaxStep(JaxStep):
    """The step of the benchmark, beside a rate of large matrix products that is not measured."""

    def __init__(self, model, overrides):
        super().__init__(model, overrides, peak=False)
        self.facts["matmul_tflops"] = 0.5


@pytest.mark.slow
def test_both_programs_run_and_their_rates_go_to_the_file(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(train_step, "JaxStep", QuickJaxStep)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # one device, of which PyTorch knows
    path = tmp_path / "measured.json"
    sizes = "model.image_size=32 model.width=32 model.num_heads=2 model.depth=2 model.decoder_depth=1".split()
    command = ["train_step", "--model=tiny", "--batch=4", "--against=torch", "--rounds=3", "--seconds=0.01"]
    monkeypatch.setattr(sys, "argv", [*command, f"--json={path}", "--set", *sizes])
    train_step.main()
    found = json.loads(path.read_text())
    assert found["programs"].keys() == {"mae_jax", "torch"} and not found["failed"]
    for name, key in (("mae_jax", "images_per_second"), ("torch", "torch_images_per_second")):
        steps = found["programs"][name]["step_seconds"]
        assert found[key] == pytest.approx(4 / steps["median"])
        assert 0 < steps["least"] <= steps["median"] <= steps["greatest"]
    assert found["ratio"] == pytest.approx(found["images_per_second"] / found["torch_images_per_second"])
    # Both reconstruct noise: each image's patches, normalised, have a variance of 1.
    losses = [program["loss"] for program in found["programs"].values()]
    assert losses == pytest.approx([1.0, 1.0], rel=0.5)
    assert f"ratio {found['ratio']:.2f}" in capsys.readouterr().out
