"""The command line as users see it: exit codes, one line for a mistake, the files of a workdir."""

import json
import math
import re

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import mae_jax
from mae_jax.data.augment import normalize
from mae_jax.data.sources import Digits
from tests.runs import TINY, losses, read_json, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config=configs/digit.py"], "configs/digits.py"),
        (["--config=configs/digits.py", "--config.train.steps=many"], "train.steps=many"),
        (["--config=configs/digits.py", "--config.data.batch_size=2000"], "batch_size=2000 is larger"),
        (["--config=configs/digits.py", "--config.init_from=/nowhere"], "/nowhere does not exist"),
        (["--config=configs/image_folder.py", "--config.data.path=/nowhere"], "data.path=/nowhere"),
        (["--config=configs/cifar10.py", "--config.data.path=/nowhere"], "tfds build cifar10"),
        (["--config=configs/reconstruct.py"], "--config.init_from="),
    ],
)
def test_a_mistake_ends_with_code_2_and_one_line_before_anything_is_compiled(tmp_path, arguments, expected):
    code, out, err = run(*arguments, f"--workdir={tmp_path}/run")
    assert code == 2
    errors = [line for line in err.splitlines() if line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and expected in errors[0]
    assert "compiled" not in out and not (tmp_path / "run" / "result.json").exists()


def test_a_variable_of_jax_that_it_cannot_read_is_a_mistake_too():
    code, out, err = run("--config=configs/digits.py", JAX_ENABLE_X64="odd")
    assert code == 2 and out == "" and err.startswith("error: ") and "JAX_ENABLE_X64" in err and err.count("\n") == 1


WITHOUT_MEMORY = """
from configs.digits import get_config
from mae_jax.tasks import train

def run(*_):
    raise MemoryError("Unable to allocate 8.00 PiB")

train.run = run
"""


def test_a_lack_of_memory_ends_with_code_1_and_one_line(tmp_path):
    (tmp_path / "without_memory.py").write_text(WITHOUT_MEMORY)
    code, _, err = run(f"--config={tmp_path}/without_memory.py", f"--workdir={tmp_path}/run")
    assert code == 1 and err.startswith("error: out of memory (Unable to allocate 8.00 PiB);") and err.count("\n") == 1


def test_help_is_no_mistake():
    code, out, err = run("-h", "--config=configs/digits.py")
    assert (code, err) == (0, "") and "--config.train.epochs=180.0" in out and "--workdir: folder of everything" in out


def test_a_workdir_that_cannot_be_made_is_a_mistake_too(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = run("--config=configs/digits.py", f"--workdir={tmp_path}/file/run")
    assert code == 2 and err.startswith("error: --workdir=") and err.count("\n") == 1


def test_a_folder_of_others_is_a_mistake_before_anything_is_written(tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    code, out, err = run(*TINY, f"--workdir={tmp_path}")
    assert code == 2 and out == "" and err.count("\n") == 1 and "config.json is another program" in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Workdir and standard output of a short run that is complete."""
    workdir = tmp_path_factory.mktemp("finished")
    code, out, err = run(*TINY, f"--workdir={workdir}", "--config.train.steps=20", "--config.train.accumulate_steps=2")
    assert code == 0, out + err
    assert err == "", "nothing but mistakes belongs on standard error where there is no terminal"
    return workdir, out


def test_a_run_tells_what_will_run_how_it_goes_and_what_was_learnt(finished):
    _, out = finished
    for text in (
        "parameters", "encoder 4 + 1, decoder 16 + 1", "FLOP", "mesh", "MiB per device", "step 10/20", "images/s",
        "left", "random encoder", "k 20, temperature 0.07", "mean of the patch tokens",
    ):  # fmt: skip
        assert text in out, text


def test_a_run_tells_where_the_time_up_to_its_first_step_went(finished):
    _, out = finished
    (line,) = [line for line in out.splitlines() if line.startswith("  start ")]
    found = re.fullmatch(
        r"  start     imports ([\d.]+) s, data ([\d.]+) s, compile ([\d.]+) s, other ([\d.]+) s: "
        r"first step after ([\d.]+) s", line
    )  # fmt: skip
    *parts, total = map(float, found.groups())
    assert sum(parts) == pytest.approx(total, abs=0.25) and parts[2] > 0.2, "they are rounded, and XLA takes its time"
    assert out.index("compiled in") < out.index(line) < out.index("step  1/20")


def test_a_workdir_has_the_promised_files(finished):
    workdir, _ = finished
    config = read_json(workdir / "config.json")
    assert config["model"]["width"] == 16 and config["train"]["accumulate_steps"] == 2
    assert config["versions"]["jax"] and "git_commit" in config
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in training] == [1, 5, 10, 15, 20]
    for name in ("train/learning_rate", "train/grad_norm", "images_per_second", "data_wait_fraction",
                 "tflops_per_second"):  # fmt: skip
        assert all(math.isfinite(line[name]) and line[name] >= 0 for line in training), name
    assert training[0]["train/learning_rate"] == 0 < training[-1]["train/learning_rate"]
    assert {"eval/loss", "eval/knn/top1", "eval/linear_probe/top1"} < lines[-1].keys()
    result = read_json(workdir / "result.json")
    for name in ("knn/top1", "linear_probe/top1", "random_encoder/knn/top1", "random_encoder/linear_probe/top1"):
        assert 0 < result[name] <= 1
    assert (workdir / "checkpoints" / "20").is_dir()
    assert Image.open(workdir / "reconstructions" / "20.png").mode == "RGB"
    assert Image.open(workdir / "metrics.png").size == (1200, 400)
    assert list(workdir.glob("events.out.tfevents*"))


def test_tensorboard_has_the_same_scalars_and_the_pictures(finished):
    workdir, _ = finished
    values = {}
    for path in workdir.glob("events.out.tfevents*"):
        data = path.read_bytes()
        while data:  # records: length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            values |= {(event.step, value.tag): value for value in event.summary.value}
            data = data[16 + length :]
    for step, loss in losses(workdir):
        assert values[step, "train/loss"].simple_value == pytest.approx(loss, rel=1e-6)  # stored as float32
    assert values[20, "reconstructions"].image.width > 400


def test_the_finished_model_loads_in_python_and_has_the_reported_loss(finished):
    workdir, _ = finished
    model = mae_jax.load(workdir)
    source = Digits("eval")
    images = normalize(np.stack([source[i]["image"] for i in range(len(source))]), model.processor)
    loss = float(model(images, key=jax.random.key(0)).loss)
    # Other masks than the evaluation's: the same expectation over 360 x 12 hidden patches.
    assert loss == pytest.approx(read_json(workdir / "result.json")["eval/loss"], rel=0.05)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_step_and_what_to_try(tmp_path):
    code, out, err = run(
        *TINY, "--config.train.steps=60", f"--workdir={tmp_path}", "--config.optimizer.base_learning_rate=1e30",
        "--config.optimizer.warmup_epochs=0.5", "--config.checkpoint.every_steps=1", "--config.train.log_every_steps=3",
        "--config.train.accumulate_steps=2", "--config.train.skip_nonfinite=2",
    )  # fmt: skip
    assert code == 1 and out.count("the update was left out") == 2
    assert err.count("\n") == 1 and "is nan at step" in err.replace("inf", "nan")
    assert "base_learning_rate" in err and "clip_norm" in err
    at_step = int(err.split("at step ")[1].split(";")[0])
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept[-1] < at_step - 2 and not (tmp_path / "result.json").exists()
    # What was kept is good: with a sane rate, as the message says, the same command goes on from it.
    code, out, err = run(*TINY, "--config.train.steps=20", f"--workdir={tmp_path}", "--config.train.accumulate_steps=2")
    assert code == 0 and f"going on from checkpoint {kept[-1]}" in out, out + err
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path))


def test_a_last_step_that_ruins_the_model_is_found_before_it_is_taken_for_a_result(tmp_path):
    code, _, err = run(
        *TINY, "--config.train.steps=1", f"--workdir={tmp_path}", "--config.optimizer.base_learning_rate=1e37",
        "--config.optimizer.warmup_epochs=0",
    )  # fmt: skip
    assert code == 1 and err.count("\n") == 1 and "eval/loss is" in err
    assert not (tmp_path / "result.json").exists() and not (tmp_path / "checkpoints" / "1").exists()


def make_pictures(folder, count, size=(40, 32), classes=2):
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class_{i % classes}" / f"{i}.{('png', 'jpg', 'webp', 'bmp', 'tiff', 'gif')[i % 6]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)


PICTURES = (
    "--config=configs/image_folder.py", "--config.model.image_size=(32, 16)", "--config.model.patch_size=8",
    "--config.model.width=16", "--config.model.depth=1", "--config.model.num_heads=2",
    "--config.model.decoder_width=16", "--config.model.decoder_depth=1", "--config.model.decoder_num_heads=2",
    "--config.data.batch_size=16", "--config.train.steps=8", "--config.train.log_every_steps=4",
    "--config.model.dtype=bfloat16", "--config.model.remat",
)  # fmt: skip


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory):
    """Folder with class folders of pictures, and a run on them in it."""
    folder = tmp_path_factory.mktemp("own_pictures")
    make_pictures(folder / "pictures", 40)
    code, out, err = run(*PICTURES, f"--config.data.path={folder}/pictures", f"--workdir={folder}/run")
    assert code == 0, out + err
    return folder


def test_a_folder_with_class_folders_is_measured_by_its_labels(own_pictures):
    result = read_json(own_pictures / "run" / "result.json")
    assert "knn/top1" in result and "linear_probe/top1" in result


def test_the_recipe_of_the_released_models_fine_tunes_on_ones_own_pictures(own_pictures, tmp_path):
    code, out, err = run(
        "--config=configs/finetune_vit_base.py", f"--config.init_from={own_pictures}/run", f"--workdir={tmp_path}",
        "--config.data.name=image_folder", f"--config.data.path={own_pictures}/pictures", "--config.data.batch_size=16",
        "--config.train.steps=3",
    )  # fmt: skip
    assert code == 0, out + err
    size = read_json(own_pictures / "run" / "config.json")["model"]["image_size"]
    assert size != 224 and read_json(tmp_path / "config.json")["model"]["image_size"] == size
    assert "float32 products" in out
    assert "model.width is 16, the checkpoint's, not 768" in out and "2 classes" in out
    assert "RandAugment, erasing 0.25, mixup 0.8, cutmix 1.0" in out
    result = read_json(tmp_path / "result.json")
    assert 0 <= result["eval/top1"] <= 1 and math.isfinite(result["eval/loss"])
    assert out.endswith(f"see {tmp_path}/result.json\n")


def test_a_flat_folder_trains_with_a_bad_picture_in_it_and_reader_processes_without_labels_and_says_so(tmp_path):
    make_pictures(tmp_path / "pictures", 120, classes=1)
    (tmp_path / "pictures" / "class_0" / "1.jpg").write_bytes(b"not a picture")
    code, out, err = run(
        *PICTURES, f"--config.data.path={tmp_path}/pictures/class_0", f"--workdir={tmp_path}/run",
        "--config.data.num_workers=2",
    )  # fmt: skip
    assert code == 0, out + err
    assert "1.jpg" in err, "the bad picture is named in the log"
    assert "1 images could not be read" in out
    assert "no labels" in out
    assert "knn/top1" not in read_json(tmp_path / "run" / "result.json")


def test_reconstruct_draws_given_pictures_with_a_given_checkpoint(tmp_path, finished):
    make_pictures(tmp_path / "pictures", 3)
    code, out, err = run(
        "--config=configs/reconstruct.py", f"--config.init_from={finished[0]}/checkpoints/20",
        f"--config.data.path={tmp_path}/pictures", f"--workdir={tmp_path}/run",
    )  # fmt: skip
    assert code == 0, out + err
    assert read_json(tmp_path / "run" / "result.json")["images"] == 3
    code, _, err = run(
        "--config=configs/reconstruct.py", f"--config.init_from={finished[0]}", f"--workdir={finished[0]}"
    )
    assert code == 2 and "belongs to a training run" in err, "pictures must not take the place of a run's results"
    picture = np.asarray(Image.open(tmp_path / "run" / "reconstructions" / "20.png"))
    assert picture.shape[0] > 3 * 112 and picture.shape[1] > 4 * 112
