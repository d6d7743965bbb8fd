"""The README's section "Your own photographs" as its readers copy it: every command, in order, for fewer steps."""

import shlex

import numpy as np
import pytest
from PIL import Image

from tests.runs import ROOT, read_json, run

SMALL = (
    "--config.model.width=24", "--config.model.depth=1", "--config.model.decoder_width=16",
    "--config.model.decoder_depth=1", "--config.model.scan_unroll=1",
)  # fmt: skip
FEW_STEPS = ("--config.train.steps=2", "--config.data.batch_size=8")


def commands_of(section: str) -> list[list[str]]:
    """The arguments of main.py in every command of a section of README.md."""
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line.strip() for line in text.replace("\\\n", "").splitlines()]
    return [shlex.split(line)[2:] for line in lines if line.startswith("python main.py ")]


def make_photos(folder):
    """Three classes of small noisy PNGs, each of a colour of its own, in folders train, validation and test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("validation", 4), ("test", 5)):
        for number, name in enumerate(("cherries", "leaves", "skies")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 128, (24, 20, 3), np.uint8)
                picture[..., number] += 100
                Image.fromarray(picture).save(folder / split / name / f"{i}.png")


@pytest.mark.slow
def test_ones_own_photographs_go_the_whole_way_by_the_commands_of_the_readme(tmp_path):
    photos, runs = tmp_path / "photos", tmp_path / "runs"
    make_photos(photos)
    commands, printed = commands_of("Your own photographs"), []
    assert len(commands) == 10
    for command in commands:
        words = [word.replace("FOLDER", str(photos)).replace("=runs/", f"={runs}/") for word in command]
        if "--config=configs/small_photos.py" in words:
            words += SMALL  # the encoder's sizes are then the checkpoint's
        if words[0].endswith(("small_photos.py", "finetune.py", "linear_probe.py")):
            words += FEW_STEPS
        code, out, err = run(*words)
        assert code == 0, f"{shlex.join(command)}\n{out}{err}"
        printed.append(out)
    assert f"30 training images in {photos}/train, 12 evaluation images in {photos}/validation" in printed[0]
    assert "  classes   3: cherries, leaves, skies\n" in printed[0]
    for name in ("photos", "photos_knn"):
        assert {"knn/top1", "random_encoder/knn/top1"} <= read_json(runs / name / "result.json").keys()
    for name in ("photos/reconstructions/2.png", "photos/metrics.png", "photos_reconstructed/reconstructions/2.png"):
        assert (runs / name).is_file()
    for name in ("photos_probe", "random_probe", "photos_finetuned", "from_scratch"):
        assert 0 <= read_json(runs / name / "result.json")["eval/top1"] <= 1
    assert read_json(runs / "photos_tested" / "result.json")["images"] == 15 and f"{photos}/test" in printed[8]
    assert (runs / "photos_timm" / "model.safetensors").is_file()
