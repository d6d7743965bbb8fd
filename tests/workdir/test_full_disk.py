"""Saving and reporting on a disk that is full for a while."""

import contextlib
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import get_config
from mae_jax.runtime.errors import NotSaved
from mae_jax.training.state import TrainState
from mae_jax.workdir import checkpoints as checkpoints_module
from mae_jax.workdir.appending import Appender
from mae_jax.workdir.checkpoints import Checkpoints
from mae_jax.workdir.checksums import find_damage
from mae_jax.workdir.reporting import Reporter
from tests.full_disk import fill, small_disk


@pytest.fixture
def disk(tmp_path):
    """A file system of its own with room for a few checkpoints of the test's state."""
    with small_disk(tmp_path / "disk", "3m"):
        yield tmp_path / "disk"


@pytest.fixture
def full(monkeypatch):
    """A function: the writes from now on fail after that many bytes, for want of room; None: they do not."""
    write, room = os.pwrite, [None]

    def pwrite(file, data, place):
        if room[0] is None:
            return write(file, data, place)
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count, room[0] = min(room[0], len(data)), max(0, room[0] - len(data))
        return write(file, data[:count], place)

    def set_room(count):
        room[0] = count

    monkeypatch.setattr(os, "pwrite", pwrite)
    return set_room


def make_state(seed):
    return TrainState(
        jnp.int32(0), {"kernel": jax.random.normal(jax.random.key(seed), (500, 500))}, {"mu": jnp.ones(7)}
    )


def open_checkpoints(workdir):
    config = get_config()
    config.checkpoint.keep = 2
    return contextlib.closing(Checkpoints(workdir, config.checkpoint, config.to_dict()))


def steps_of(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def save_and_settle(checkpoints, step):
    checkpoints.save(step, make_state(step))
    while checkpoints._being_saved:
        checkpoints.check()


def test_a_save_on_a_full_disk_is_told_leaves_nothing_and_the_next_one_with_room_works(disk, capsys):
    with open_checkpoints(disk) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        fill(disk / "filler")
        for step in (2, 3):
            save_and_settle(checkpoints, step)
            assert capsys.readouterr().out == (
                f"checkpoint {step} cannot be saved: No space left on device; checkpoint 1 is kept, the run goes on "
                "and tries again at the next one\n"
            )
            checkpoints.check()
            assert steps_of(disk) == ["1"] and checkpoints.latest_step() == 1
        (disk / "filler").unlink()
        for step in (4, 5):
            save_and_settle(checkpoints, step)
        checkpoints.wait()
        assert capsys.readouterr().out == ""
        assert steps_of(disk) == ["4", "5"], "what cannot be saved does not count among those that are kept"
        for step in "45":
            assert find_damage(disk / "checkpoints" / step) is None


def test_a_last_save_on_a_full_disk_is_an_error_that_says_where_the_run_goes_on(disk):
    with open_checkpoints(disk) as checkpoints:
        fill(disk / "filler")
        checkpoints.save(1, make_state(1))
        with pytest.raises(NotSaved, match="1 cannot be saved: No space .*; free space in .* from the beginning"):
            checkpoints.wait()
        (disk / "filler").unlink()
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
        fill(disk / "filler")
        checkpoints.save(3, make_state(3))
        with pytest.raises(NotSaved, match="goes on from checkpoint 2$"):
            checkpoints.wait()
    assert steps_of(disk) == ["2"]


@pytest.mark.parametrize("place", ["write_manifest", "rename", "mkdir"])
def test_wherever_a_save_fails_the_one_before_stays_and_the_next_one_works(tmp_path, monkeypatch, capsys, place):
    def fail(*_, **__):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints_module if place == "write_manifest" else os, place, fail)
            checkpoints.save(2, make_state(2))
            with pytest.raises(NotSaved, match=r"2 cannot be saved: Disk quota exceeded; .* from checkpoint 1$"):
                checkpoints.wait()
        assert steps_of(tmp_path) == ["1"]
        save_and_settle(checkpoints, 3)
        assert capsys.readouterr().out == "", "it was raised"
        checkpoints.wait()
        assert steps_of(tmp_path) == ["1", "3"] and find_damage(tmp_path / "checkpoints" / "3") is None


def lines_of(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


def test_metrics_wait_for_room_in_order_without_a_half_line_and_both_are_told_once(tmp_path, full, capsys):
    reporter = Reporter(tmp_path, start_step=0, total_steps=10, batch_size=32, flops_per_image=lambda _: 5e9)
    reporter.saved(1, 0.5)
    full(10)
    for step in (2, 3, 4):
        reporter.saved(step, 0.5)
        assert lines_of(tmp_path) == [1]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "metrics.jsonl cannot be written: No space left on device; the run goes on" in out
    full(len('{"step": 2, "save_seconds": 0.5}\n'))
    reporter.saved(5, 0.5)
    assert lines_of(tmp_path) == [1, 2]
    full(None)
    reporter.saved(6, 0.5)
    assert lines_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert "metrics.jsonl can be written again, and is complete" in capsys.readouterr().out
    reporter.close()
    assert capsys.readouterr().out == ""


def test_what_could_not_be_written_to_the_end_is_told(tmp_path, full, capsys):
    file = Appender(tmp_path / "file")
    full(0)
    for _ in range(3):
        file.append(b"a line\n")
    file.close()
    assert "file lacks the last 3 entries" in capsys.readouterr().out


def test_tensorboard_pictures_and_config_do_not_stop_a_run_and_come_when_there_is_room(disk, capsys):
    fill(disk / "filler")
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    reporter = Reporter(
        disk, start_step=0, total_steps=10, batch_size=32, flops_per_image=lambda _: 5e9, unwritten_config={"a": 1}
    )
    for step in range(1, 31):  # more than the queue of tensorboardX holds
        reporter.saved(step, 0.5)
    reporter.picture(30, "reconstructions", noise)
    assert "30.png cannot be written: No space left on device; the run goes on without it" in capsys.readouterr().out
    (disk / "filler").unlink()
    assert not (disk / "config.json").exists() and not (disk / "reconstructions" / "30.png.tmp").exists()
    reporter.saved(31, 0.5)
    reporter.picture(31, "reconstructions", noise)
    reporter.close()
    assert json.loads((disk / "config.json").read_text()) == {"a": 1}
    assert lines_of(disk) == list(range(1, 32))
    assert (disk / "reconstructions" / "31.png").exists()
    events = b"".join(file.read_bytes() for file in disk.glob("events.out.tfevents*"))
    assert events.count(b"save_seconds") == 31 and events.count(b"PNG") == 2


def test_a_resumed_run_cuts_its_metrics_on_a_full_disk_too(disk):
    (disk / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(9)))
    fill(disk / "filler")
    Reporter(disk, start_step=5, total_steps=10, batch_size=32, flops_per_image=lambda _: 5e9).close()
    assert lines_of(disk) == [0, 1, 2, 3, 4, 5]
