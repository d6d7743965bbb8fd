"""Checkpoints that are damaged after they were written: found, told, set aside, and the one before is used."""

import contextlib
import hashlib
import random
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from configs.common import get_config
from mae_jax.interop.workdirs import read_workdir
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.mesh import AXES
from mae_jax.training.step import TrainState, abstract_state
from mae_jax.workdir.checkpoints import CHECKSUMS, Checkpoints, find_damage


def init(key):
    return TrainState(jnp.int32(0), {"encoder": {"kernel": jax.random.normal(key, (30, 40))}}, {"mu": jnp.ones(7)})


MESH = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1), AXES)
ABSTRACT = abstract_state(init, MESH)


def open_checkpoints(workdir, **model):
    config = get_config()
    config.model.update(model)
    config.checkpoint.keep = 2
    return contextlib.closing(Checkpoints(workdir, config.checkpoint, config.to_dict()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    with open_checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, init(jax.random.key(step)))
        checkpoints.wait()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of it."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("kept", [True, False], ids=["a copy", "renamed"])
def test_a_checkpoint_under_another_steps_number_is_refused_and_nothing_is_moved(workdir, kept):
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "2", folder / "9") if kept else (folder / "2").rename(folder / "9")
    before = files_of(workdir)
    for use in (resume, read_workdir):
        with pytest.raises(UserError, match="belongs to step 2: rename its folder to 2, or move it away$") as error:
            use(workdir)
        assert "\n" not in str(error.value) and "9" in str(error.value)
    assert files_of(workdir) == before
    with pytest.raises(UserError, match="checkpoints/9 belongs to step 2"):
        read_workdir(folder / "9")
    shutil.copytree(folder / "9", workdir / "best")
    assert read_workdir(workdir / "best").step == 2  # whatever else it is called


def resume(workdir):
    with open_checkpoints(workdir) as checkpoints:
        return checkpoints.newest_whole()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, rng=random):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng=random):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def delete(path, _):
    path.unlink()


def assert_is(state, step):
    assert int(state.step) == step
    np.testing.assert_array_equal(
        state.params["encoder"]["kernel"], init(jax.random.key(step)).params["encoder"]["kernel"]
    )


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_damage_to_any_file_is_found_and_names_the_file(saved, tmp_path, damage):
    original, rng = saved / "checkpoints" / "2", random.Random(0)
    names = [file.relative_to(original) for file in files_of(original)]
    assert len(names) > 15 and Path(CHECKSUMS) in names and Path("_CHECKPOINT_METADATA") in names
    assert find_damage(original) is None
    folder = shutil.copytree(original, tmp_path / "2")
    for name in names:
        damage(folder / name, rng)
        if damage is delete and name == Path(CHECKSUMS):  # a run that was killed has not written it
            assert find_damage(folder) is None
        else:
            assert find_damage(folder).startswith(f"{name} "), name
        shutil.copy(original / name, folder / name)
    assert find_damage(folder) is None


def test_a_flipped_bit_anywhere_in_the_list_itself_is_found(saved, tmp_path):
    folder = shutil.copytree(saved / "checkpoints" / "2", tmp_path / "2")
    data = (folder / CHECKSUMS).read_bytes()
    for place in (*range(0, len(data), 11), *range(len(data) - 67, len(data))):  # its last line is the seal
        (folder / CHECKSUMS).write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        assert find_damage(folder) == f"{CHECKSUMS} has other bytes than were written"


def test_sha256sum_can_check_a_checkpoint_too(workdir):
    folder = workdir / "checkpoints" / "2"
    command = ["sha256sum", "--check", "--strict", CHECKSUMS]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    flip(folder / "params" / "_METADATA")
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1


def test_a_file_that_a_user_puts_beside_the_others_is_no_damage(workdir):
    (workdir / "checkpoints" / "2" / "notes.txt").write_text("a good one")
    assert find_damage(workdir / "checkpoints" / "2") is None


@pytest.mark.parametrize("damage", [flip, cut, delete])
def test_whatever_file_of_the_newest_is_damaged_the_one_before_is_used_and_both_are_told(
    saved, tmp_path, damage, capsys
):
    rng = random.Random(1)
    for number, original in enumerate(files_of(saved / "checkpoints" / "2")):
        if damage is delete and original.name == CHECKSUMS:
            continue
        workdir = shutil.copytree(saved, tmp_path / str(number))
        name = original.relative_to(saved / "checkpoints" / "2")
        damage(workdir / "checkpoints" / "2" / name, rng)
        with open_checkpoints(workdir) as checkpoints:
            assert checkpoints.newest_whole() == 1, name
            assert_is(checkpoints.restore(1, ABSTRACT), 1)
            out = capsys.readouterr().out
            assert out.startswith(f"checkpoint 2 is damaged: {name} ") and out.count("\n") == 1
            assert out.endswith(f"; moved to {workdir}/checkpoints_set_aside/2, going on from checkpoint 1\n")
            assert checkpoints.latest_step() == 1
            assert (workdir / "checkpoints_set_aside" / "2").is_dir()
            checkpoints.save(2, init(jax.random.key(2)))  # the run comes there again
            checkpoints.wait()
            assert checkpoints.newest_whole() == 2


def test_what_is_set_aside_costs_no_good_one_and_replaces_nothing(workdir):
    for _ in range(2):
        flip(workdir / "checkpoints" / "2" / "params" / "_METADATA")
        with open_checkpoints(workdir) as checkpoints:
            assert checkpoints.newest_whole() == 1
            checkpoints.save(2, init(jax.random.key(2)))
            checkpoints.wait()
    assert {path.name for path in (workdir / "checkpoints_set_aside").iterdir()} == {"2", "2.1"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"1", "2"}


def test_if_none_is_whole_the_user_is_told_and_nothing_moves(workdir):
    for step in "12":
        flip(workdir / "checkpoints" / step / "params" / "_METADATA")
    before = files_of(workdir)
    with open_checkpoints(workdir) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint in .* is intact; the newest, 2: params/_METADATA has other"):
            checkpoints.newest_whole()
    assert files_of(workdir) == before


def test_settings_that_do_not_fit_are_no_damage(workdir):
    flip(workdir / "checkpoints" / "2" / "params" / "_METADATA")
    before = files_of(workdir)
    with open_checkpoints(workdir, width=132) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoint 1 .*model.width=.*model.width=132"):
            checkpoints.newest_whole()
    assert files_of(workdir) == before


def test_a_checkpoint_whose_checksums_lack_a_file_that_orbax_adds_last_is_whole(workdir):
    # As an earlier version left one if it was killed just before it listed that file.
    checksums = workdir / "checkpoints" / "2" / CHECKSUMS
    lines = [line for line in checksums.read_text().splitlines(True) if line[0] != "#" and "_CHECKPOINT_" not in line]
    checksums.write_text("".join(lines) + f"# {hashlib.sha256(''.join(lines).encode()).hexdigest()}\n")
    with open_checkpoints(workdir) as checkpoints:
        assert checkpoints.newest_whole() == 2
        assert_is(checkpoints.restore(2, ABSTRACT), 2)


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 2, "layout": 2}', '{"step": 2, "layout": 2, "config": 3}'])
def test_a_description_that_says_nothing_is_damage_without_checksums_too(workdir, text, capsys):
    folder = workdir / "checkpoints" / "2"
    (folder / CHECKSUMS).unlink()
    (folder / "about" / "metadata").write_text(text)
    assert resume(workdir) == 1
    assert "checkpoint 2 is damaged: about/metadata cannot be read; moved to" in capsys.readouterr().out


def test_only_what_makes_the_model_is_checked_when_weights_are_read_and_damage_is_refused(workdir):
    def read(path):
        return read_workdir(path).params["encoder"]["kernel"]

    flip(next((workdir / "checkpoints" / "2" / "opt_state" / "d").iterdir()))
    np.testing.assert_array_equal(read(workdir), init(jax.random.key(2)).params["encoder"]["kernel"])
    for name in ("about/metadata", "params/_METADATA"):
        flip(workdir / "checkpoints" / "2" / name)
        with pytest.raises(UserError) as error:
            read(workdir)
        assert f"2 is damaged: {name} has other bytes" in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith(f"take an earlier one, such as {workdir}/checkpoints/1")
        shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "2", dirs_exist_ok=True)
    flip(workdir / "checkpoints" / "1" / "params" / "_METADATA")
    with pytest.raises(UserError, match="checkpoints/1 is damaged: .*; take another one"):
        read(workdir / "checkpoints" / "1")
