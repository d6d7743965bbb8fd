"""Every kind of data through everything that is done with it: trained on, measured, killed, resumed, exported."""

import signal

import jax
import numpy as np
import pytest

import mae_jax
from configs import common
from mae_jax.data.loader import make_train_batches
from mae_jax.data.sources import make_source
from tests import kinds
from tests.runs import TINY, compiling_once, one_device, read_checkpoint, read_json, run, run_task

pytestmark = pytest.mark.slow
FORMS = ("folder", "table", "parquet", "webdataset", "prepared")
DEEP = {"bands": (kinds.write_bands, 13), "grey12": (kinds.write_grey12, 1), "gaps": (kinds.write_gaps, 2)}
LABELS = ("multi", "number")
KINDS = (*FORMS, *DEEP, "prepared_bands", *LABELS)
MODEL = {"image_size": 16, "patch_size": 4, "scan_unroll": 1}
USUAL = {"mean": (0.5,), "std": (0.25,), "batch_size": 16}
SCORE = {"multi": "mAP", "number": "r2"}  # else top1


@pytest.fixture(scope="module")
def data_of(tmp_path_factory):
    """Kind -> (settings `data.*`, channels)."""
    root = tmp_path_factory.mktemp("kinds")
    found = {name: (settings, 3) for name, settings in kinds.write_others(root).items()}
    with one_device():
        prepared = {f"data__{name}": value for name, value in found["table"][0].items()}
        run_task("prepare", root / "prepared", **prepared)
    found["prepared"] = {"name": "prepared", "path": str(root / "prepared")}, 3
    for name, (write, channels) in DEEP.items():
        found[name] = write(root / name), channels
    for name in LABELS:
        (root / name).mkdir()
        found[name] = kinds.write_labels(root / name, name), 3
    bands, channels = found["bands"]
    with one_device():
        options = {f"data__{name}": value for name, value in bands.items() if name != "value_range"}
        run_task("prepare", root / "prepared_bands", model__channels=channels, **options)
    found["prepared_bands"] = {"name": "prepared", "path": str(root / "prepared_bands")}, channels
    usual = {name: USUAL for name in found} | {"prepared_bands": {"batch_size": 16}}  # its description has the values
    return {name: (usual[name] | settings, channels) for name, (settings, channels) in found.items()}


def settings_of(kind, data_of) -> dict:
    data, channels = data_of[kind]
    model = MODEL | {"channels": channels}
    return {
        f"{group}.{key}": value for group, values in (("data", data), ("model", model)) for key, value in values.items()
    }


def batches_of(data, channels, steps, share=(0, 1), start=0):
    config = common.get_config().data
    config.update(data, crop_scale=(0.5, 1.0))
    config.dtype = "uint8"
    source = make_source(config, "train", (16, 16), channels)
    batches = make_train_batches(source, config, (16, 16), channels, start, share)
    found = [next(batches) for _ in range(steps)]
    batches.close()
    return found


def test_the_same_pictures_in_every_form_give_the_same_batches_bit_for_bit(data_of):
    wanted = batches_of(*data_of["folder"], 3)
    for form in FORMS[1:]:
        for batch, other in zip(wanted, batches_of(*data_of[form], 3), strict=True):
            for name in batch:
                np.testing.assert_array_equal(batch[name], other[name], err_msg=f"{form}: {name}")


@pytest.mark.parametrize("form", FORMS[1:])
def test_two_processes_and_a_restart_read_the_same_batches(form, data_of):
    first, second = batches_of(*data_of[form], 2)
    halves = [batches_of(*data_of[form], 1, share=(rank, 2), start=1)[0] for rank in range(2)]
    for name in second:
        np.testing.assert_array_equal(second[name], np.concatenate([half[name] for half in halves]))


@pytest.fixture(scope="module")
def trained(data_of, tmp_path_factory):
    """Kind -> the workdir of a pre-training run of 8 steps, made when asked for."""
    made = {}

    def make(kind):
        if kind not in made:
            settings = {key.replace(".", "__"): value for key, value in settings_of(kind, data_of).items()}
            with compiling_once(), one_device():
                workdir = tmp_path_factory.mktemp("trained") / kind
                made[kind] = run_task("digits", workdir, train__steps=8, evaluate__random_encoder=False,
                                      **settings)  # fmt: skip
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_trained_on_measured_fine_tuned_and_exported(kind, trained, tmp_path):
    score = SCORE.get(kind, "top1")
    result = read_json(trained(kind) / "result.json")
    assert np.isfinite(result["eval/loss"]) and {f"knn/{score}", f"linear_probe/{score}"} <= result.keys()
    with compiling_once(), one_device():
        knn = run_task("knn", tmp_path / "knn", init_from=str(trained(kind)), evaluate__random_encoder=False)
        assert f"knn/{score}" in read_json(knn / "result.json")
        tuned = run_task("finetune", tmp_path / "tuned", init_from=str(trained(kind)), train__steps=3,
                         data__batch_size=16)  # fmt: skip
        scored = run_task("evaluate", tmp_path / "scored", init_from=str(tuned))
        export = run_task("export", tmp_path / "export", init_from=str(tuned), format="facebook")
    results = [read_json(folder / "result.json")[f"eval/{score}"] for folder in (tuned, scored)]
    assert results[0] == results[1]
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, mae_jax.load(tuned).config.encoder.channels))
    np.testing.assert_allclose(mae_jax.load(export)(images), mae_jax.load(tuned)(images), atol=1e-5)


def test_the_pictures_of_another_table_are_reconstructed(trained, data_of, tmp_path):
    (tmp_path / "other.csv").write_text("file\n" + "".join(f"{index:03d}.jpg\n" for index in (35, 38, 41)))
    folder = f"{data_of['folder'][0]['path']}/validation/plain"
    with compiling_once(), one_device():
        run_task("reconstruct", tmp_path / "run", init_from=str(trained("table")), data__name="table",
                 data__path=str(tmp_path / "other.csv"), data__root=folder)  # fmt: skip
    assert read_json(tmp_path / "run" / "result.json")["images"] == 3


def train(kind, data_of, workdir, writers=""):
    """The exit code, and what was printed, of a run of 8 steps."""
    settings = [f"--config.{key}={value}" for key, value in settings_of(kind, data_of).items()]
    return run(*TINY, *settings, "--config.train.steps=8", "--config.checkpoint.every_steps=3", f"--workdir={workdir}",
               "--config.train.log_every_steps=1", "--config.evaluate.evaluators=('loss',)",
               f"--config.logging.writers=('jsonl',{writers})")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bits(kind, data_of, trained, tmp_path):
    code, out, err = train(kind, data_of, tmp_path, "'tests.kinds:Killer'")
    assert code == -signal.SIGKILL, out + err
    code, out, err = train(kind, data_of, tmp_path)
    assert code == 0 and "going on from checkpoint" in out, out + err
    found, wanted = read_checkpoint(tmp_path, 8), read_checkpoint(trained("folder" if kind in FORMS else kind), 8)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
