"""Errors of the disk or the network while pictures are read: waited for if they may pass, else a bad picture."""

import errno
import itertools
import os
import pickle
import threading

import numpy as np
import pytest

from mae_jax.data.loader import make_train_batches
from mae_jax.runtime import errors
from mae_jax.runtime.errors import PAUSES, UserError, with_patience
from tests.data.conftest import assert_same
from tests.data.test_tfds_source import IMAGE, LABEL, prepare

PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.EMFILE)
LASTING = (errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EBADMSG)


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds that were waited, which no test does."""
    seconds = []
    monkeypatch.setattr(errors.time, "sleep", seconds.append)
    return seconds


class Unsteady:
    """200 pictures; the first `failures[i]` reads of picture i fail with `code`."""

    num_classes, class_names, in_memory, picture_size = 0, None, False, None

    def __init__(self, failures, code=errno.EIO):
        self._left, self._code, self._lock, self.reads = dict(failures), code, threading.Lock(), 0

    def __len__(self):
        return 200

    def __getitem__(self, index):
        with self._lock:
            self.reads += 1
            if self._left.get(index, 0) > 0:
                self._left[index] -= 1
                raise OSError(self._code, os.strerror(self._code))
        return {"image": np.full((8, 8, 3), index, np.uint8), "label": index}

    def name_of(self, index):
        return f"#{index}"


def read(config, source, count=20):
    iterator = make_train_batches(source, config, (8, 8), 3)
    try:
        return list(itertools.islice(iterator, count)), iterator.bad_images
    finally:
        iterator.close()


@pytest.fixture
def config(make_config):
    return make_config(batch_size=20, num_threads=4)


@pytest.mark.parametrize("code", PASSING)
def test_errors_that_pass_leave_every_batch_as_it_is_without_them(config, code):
    expected, _ = read(config, Unsteady({}))
    batches, bad = read(config, Unsteady({3: 1, 50: len(PAUSES), 51: 2, 120: 3}, code))
    assert_same(batches, expected)
    assert bad == {}


def test_an_error_that_stays_is_a_bad_picture_with_its_reason(config, caplog, pauses):
    batches, bad = read(config, Unsteady({17: 10**9}))
    assert bad == {17: "#17"}
    assert all(17 not in batch["index"] for batch in batches)
    [warning] = [record.message for record in caplog.records if record.name == "mae_jax"]
    assert "#17 (Input/output error)" in warning
    assert pauses[: len(PAUSES)] == list(PAUSES)
    config.on_bad_image = "raise"
    with pytest.raises(UserError, match="#17 cannot be used: Input/output error"):
        read(config, Unsteady({17: 10**9}))


@pytest.mark.parametrize("code", LASTING)
def test_errors_that_no_waiting_mends_are_not_waited_for(config, pauses, code):
    _, bad = read(config, Unsteady({17: 10**9}, code))
    assert list(bad) == [17] and pauses == []


def test_the_wait_for_one_picture_grows_and_is_two_seconds_in_all(pauses):
    calls = []

    def fail():
        calls.append(1)
        raise TimeoutError(errno.ETIMEDOUT, "timed out")

    with pytest.raises(TimeoutError):
        with_patience(fail)
    assert len(calls) == len(PAUSES) + 1 and pauses == sorted(pauses) and sum(pauses) == pytest.approx(2)


def test_what_is_no_error_of_the_system_is_raised_at_once(pauses):
    with pytest.raises(ZeroDivisionError):
        with_patience(lambda: 1 // 0)
    assert pauses == []


@pytest.fixture
def tiny(tmp_path, make_config):
    """Returns a function that opens a data set of 30 pictures as ArrayRecord; and the file that it is in."""
    from mae_jax.data.sources import make_source

    prepare(tmp_path, {"image": IMAGE, "label": LABEL}, {"train": 30})
    file = next(tmp_path.rglob("*array_record*"))
    return lambda: make_source(make_config(name="tiny", path=str(tmp_path)), "train", (8, 8), 3), file


def break_reading(file) -> list[tuple[int, int]]:
    """Makes reads of an open file fail with EIO, and returns what `mend` needs: (descriptor, a copy of it)."""
    broken = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(file):
                broken.append((int(name), os.dup(int(name))))
        except OSError:  # the descriptor of the listing itself
            continue
    memory = os.open("/proc/self/mem", os.O_RDONLY)  # its first pages cannot be read
    for descriptor, _ in broken:
        os.dup2(memory, descriptor)
    os.close(memory)
    return broken


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs Linux")
def test_after_an_error_of_the_disk_array_record_files_are_opened_again(tiny):
    open_tiny, file = tiny
    source = open_tiny()
    expected = source[3]
    broken = break_reading(file)
    assert broken, "the file is open"
    with pytest.raises(OSError) as error:
        source[4]
    assert error.value.errno == errno.EIO and "pread() failed: Input/output error" in str(error.value)
    assert source[3] == expected and pickle.loads(pickle.dumps(source))[3] == expected
    for descriptor in broken:
        os.close(descriptor[1])


def test_array_record_files_that_are_damaged_cut_short_or_gone_are_errors_that_stay(tiny):
    open_tiny, file = tiny
    data = file.read_bytes()
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    for content, code, text in (
        (damaged, errno.EBADMSG, "hash mismatch"),
        (data[: len(data) // 2], errno.EBADMSG, "the record is empty"),
        (None, errno.ENOENT, "No such file"),
    ):
        source = open_tiny()
        file.write_bytes(content) if content else file.unlink()
        errors = []
        for index in range(30):
            try:
                source[index]
            except OSError as error:
                errors.append(error)
        assert errors and {error.errno for error in errors} == {code} and text in str(errors[0])
        with pytest.raises(UserError, match="the labels in tiny train cannot be read: "):
            source.labels()
        file.write_bytes(data)
