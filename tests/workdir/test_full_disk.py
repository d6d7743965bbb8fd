"""A disk that is full ends a run with the reason; nothing that was complete is lost, and it can go on."""

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
from mae_jax.training.step import TrainState
from mae_jax.workdir import checkpoints as checkpoints_module
from mae_jax.workdir.checkpoints import Checkpoints, find_damage
from mae_jax.workdir.metrics import Writers, read_metrics
from mae_jax.workdir.reporting import Reporter
from tests.full_disk import fill, small_disk


@pytest.fixture
def disk(tmp_path):
    """A file system of its own with room for a few checkpoints of the test's state."""
    with small_disk(tmp_path / "disk", "5m"):
        yield tmp_path / "disk"


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


def test_a_save_on_a_full_disk_is_an_error_that_says_where_the_run_goes_on(disk):
    for step, start in ((1, "starts from the beginning"), (2, "resumes from checkpoint 1")):
        with open_checkpoints(disk) as checkpoints:
            fill(disk / "filler")
            with pytest.raises(NotSaved) as error:
                checkpoints.save(step, make_state(step))
            message = str(error.value)
            assert message.startswith(f"checkpoint {step} cannot be saved: No space left on device (1,131,")
            assert message.endswith(f"; free space in {disk}/checkpoints or fix what else is wrong there; "
                                    f"then the same command {start}")  # fmt: skip
        (disk / "filler").unlink()
        with open_checkpoints(disk) as checkpoints:
            assert checkpoints.newest_whole() == (step - 1 or None)
            checkpoints.save(step, make_state(step))
            checkpoints.wait()
    assert steps_of(disk) == ["1", "2"]


@pytest.mark.parametrize("place", ["write_checksums", "rename", "mkdir"])
@pytest.mark.parametrize("find", ["check", "wait", "save"])
def test_wherever_a_save_fails_it_is_raised_at_the_next_look_and_the_one_before_stays(
    tmp_path, monkeypatch, place, find
):
    def fail(*_, **__):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    complete = place == "write_checksums"  # all that is missing is its checksums
    expected = rf"2 cannot be saved: Disk quota exceeded; .* from checkpoint {1 + complete}$"
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        with monkeypatch.context() as patch, pytest.raises(NotSaved, match=expected):
            patch.setattr(checkpoints_module if complete else os, place, fail)
            checkpoints.save(2, make_state(2))
            while find == "check":
                checkpoints.check()
            checkpoints.wait() if find == "wait" else checkpoints.save(3, make_state(3))
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest_whole() == 1 + complete
        checkpoints.save(3, make_state(3))
        checkpoints.wait()
    assert steps_of(tmp_path) == (["2", "3"] if complete else ["1", "3"]), "what has failed is gone"
    assert find_damage(tmp_path / "checkpoints" / "3") is None


def open_reporter(workdir, start_step=0):
    writers = Writers(workdir, {"logging": {"writers": ()}}, start_step)
    speed = dict(total_steps=10, batch_size=32, flops_per_image=lambda _: 5e9)
    return contextlib.closing(Reporter(workdir, writers, start_step=start_step, **speed))


@pytest.mark.parametrize("what", ["line", "picture"])
def test_numbers_and_pictures_that_cannot_be_written_end_the_run_at_once(disk, what):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    with pytest.raises(OSError, match="No space left on device"), open_reporter(disk) as reporter:
        reporter.saved(1, 0.5)
        fill(disk / "filler")
        for _ in range(1000):  # what is left of a block of the disk takes some
            reporter.saved(2, 0.5) if what == "line" else reporter.picture(2, "reconstructions", noise)
    (disk / "filler").unlink()
    assert not list(disk.rglob("*.tmp"))
    with open_reporter(disk, start_step=1) as reporter:  # the line that was cut short, or half of it, is gone
        reporter.saved(2, 0.5)
    assert [line["step"] for line in read_metrics(disk / "metrics.jsonl")] == [1, 2]
    assert all(json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines())
