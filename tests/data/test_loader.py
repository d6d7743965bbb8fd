"""Batches: their order, what decides it, and that nothing else does."""

import errno
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mae_jax.data import loader, workers
from mae_jax.data.decoding import BadImage
from mae_jax.data.device_batches import DeviceBatches
from mae_jax.data.loader import make_eval_batches, make_train_batches
from mae_jax.data.sources import make_source
from mae_jax.data.transforms import Picture, random_crop
from mae_jax.data.workers import call_ahead
from mae_jax.runtime.errors import UserError
from mae_jax.runtime.signals import Stopped, StopSignal
from tests.data.conftest import SIZE, assert_same


def test_a_batch_is_uint8_pictures_with_labels_and_indices(batches):
    (batch,) = batches(1)
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {"image": ((12, 8, 8, 3), "uint8"), "label": ((12,), "int32"), "index": ((12,), "int64")}
    np.testing.assert_array_equal(batch["label"], batch["index"] % 10)  # as synthetic labels are defined


def test_every_epoch_covers_every_example_exactly_once_in_a_new_order(batches):
    indices = np.concatenate([batch["index"] for batch in batches(10)])  # 120 places: 3 epochs of 40
    epochs = indices.reshape(3, 40)
    np.testing.assert_array_equal(np.sort(epochs), np.broadcast_to(np.arange(40), (3, 40)))
    for one, other in itertools.combinations([*epochs, np.arange(40)], 2):
        assert (one == other).sum() < 10  # by chance, one in 40 is in the same place


def test_the_crops_of_a_picture_differ_each_time(batches):
    crops = {}
    for batch in batches(10):
        for index, image in zip(batch["index"], batch["image"], strict=True):
            crops.setdefault(int(index), []).append(image.tobytes())
    assert all(len(set(images)) == 3 for images in crops.values())


def test_the_seed_decides_the_order(batches):
    assert_same(batches(3, seed=5), batches(3, seed=5))
    assert (batches(1, seed=5)[0]["index"] != batches(1, seed=6)[0]["index"]).any()


def test_the_seed_decides_the_crops():
    image = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    crop = functools.partial(random_crop, Picture(image), 7, SIZE, scale=(0.2, 1.0), ratio=(0.75, 4 / 3))
    crops = [crop(seed=seed).tobytes() for seed in (5, 5, 6)]
    assert crops[0] == crops[1] != crops[2]


@pytest.mark.parametrize("process_count", [2, 3, 4])
def test_the_batch_of_a_step_is_the_same_for_any_number_of_processes(batches, process_count):
    whole = batches(8)
    shares = [batches(8, process_index=i, process_count=process_count) for i in range(process_count)]
    joined = [
        {key: np.concatenate([share[key] for share in step]) for key in step[0]}
        for step in zip(*shares, strict=True)
    ]  # fmt: skip
    assert_same(joined, whole)


@pytest.mark.parametrize("start_step", [1, 3, 7, 1_000_003])
def test_a_restart_at_a_step_goes_on_with_the_same_batches(batches, start_step):
    if start_step < 10:
        assert_same(batches(8 - start_step, start_step=start_step), batches(8)[start_step:])
    else:  # far into training: the share of two processes must agree with one
        whole = batches(2, start_step=start_step)
        half = batches(2, start_step=start_step, process_index=1, process_count=2)
        np.testing.assert_array_equal(half[1]["image"], whole[1]["image"][6:])


@pytest.mark.parametrize("settings", [{"num_threads": 0}, {"num_threads": 1}, {"prefetch_batches": 0}])
def test_threads_and_buffers_do_not_change_the_batches(batches, settings):
    assert_same(batches(8, **settings), batches(8))


def test_the_size_of_the_pieces_that_threads_read_does_not_change_the_batches(batches, monkeypatch):
    whole = batches(8)
    for size in (1, 5, 6):  # batches of 12 rows in pieces of 1, 4 and 6
        monkeypatch.setattr(loader, "MAX_PIECE", size)
        assert_same(batches(8), whole)


@pytest.mark.slow
def test_worker_processes_change_neither_training_nor_evaluation(batches, make_config, monkeypatch):
    settings = {"augmentation": "rand_augment", "size_at": grow, "start_step": 2}
    expected = batches(6, **settings)
    config = make_config(name="synthetic", num_examples=76)
    source = make_source(config, "eval", (12, 12), 3)
    evaluation = list(make_eval_batches(source, config, 8, SIZE, 3))
    monkeypatch.setattr(loader, "MAX_PIECE", 4)  # so that workers share each batch
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))  # two threads in each
    assert_same(batches(6, num_workers=2, **settings), expected)
    config.num_workers = 1  # for five pieces
    assert_same(list(make_eval_batches(source, config, 8, SIZE, 3)), evaluation)


def grow(step: int) -> tuple[int, int]:
    return (6, 4) if step < 5 else SIZE


def test_full_crops_show_small_pictures_as_they_are(make_config):
    config = make_config(name="digits", batch_size=16, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), eval_crop=1.0)
    train, evaluation = (make_source(config, split, SIZE, 1) for split in ("train", "eval"))
    for source, iterator in (
        (train, make_train_batches(train, config, SIZE, 1)),
        (evaluation, make_eval_batches(evaluation, config, 16, SIZE, 1)),
    ):
        batch = next(iterator)
        np.testing.assert_array_equal(batch["image"], np.stack([source[i]["image"] for i in batch["index"]]))
        iterator.close()


@pytest.mark.parametrize("process_count", [1, 3])
@pytest.mark.parametrize("num_examples, steps", [(76, 2), (96, 2), (100, 3)])  # evaluation has a quarter: 19, 24, 25
def test_evaluation_sees_every_example_exactly_once_in_order(make_config, process_count, num_examples, steps):
    config = make_config(name="synthetic", num_examples=num_examples)
    source = make_source(config, "eval", (12, 12), 3)
    shares = [list(make_eval_batches(source, config, 12, SIZE, 3, (i, process_count))) for i in range(process_count)]
    assert [len(share) for share in shares] == [steps] * process_count
    rows = {key: np.concatenate([share[step][key] for step in range(steps) for share in shares])
            for key in ("image", "label", "index", "weight")}  # fmt: skip
    total, real = 12 * steps, num_examples // 4
    assert rows["weight"].dtype == np.float32 and rows["image"].shape == (total, *SIZE, 3)
    np.testing.assert_array_equal(rows["weight"], np.arange(total) < real)
    np.testing.assert_array_equal(rows["index"], np.where(np.arange(total) < real, np.arange(total), -1))
    np.testing.assert_array_equal(rows["label"], np.where(np.arange(total) < real, np.arange(total) % 10, -1))
    assert not rows["image"][real:].any() and rows["image"][:real].any(axis=(1, 2, 3)).all()


def test_an_iterator_that_has_ended_or_was_closed_stays_so(make_config):
    config = make_config(name="synthetic", num_examples=76)
    iterator = make_eval_batches(make_source(config, "eval", SIZE, 3), config, 12, SIZE, 3)
    assert (len(list(iterator)), len(list(iterator))) == (2, 0)
    config.batch_size = 12
    iterator = make_train_batches(make_source(config, "train", SIZE, 3), config, SIZE, 3)
    next(iterator)
    iterator.close()
    iterator.close()
    assert not list(iterator)


class Counting:
    """A source that takes its time and notes how far it was read."""

    num_classes, class_names, in_memory, picture_size = 0, None, False, None

    def __init__(self):
        self.reads, self._lock = 0, threading.Lock()

    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        with self._lock:
            self.reads += 1
        return {"image": np.full((8, 8, 3), 7, np.uint8), "label": -1}


def test_what_is_read_ahead_is_bounded(make_config):
    config = make_config(batch_size=128, num_threads=3, prefetch_batches=2)
    source = Counting()
    iterator = make_train_batches(source, config, SIZE, 3)
    next(iterator)
    time.sleep(0.5)  # the readers stop when the buffer is full
    iterator.close()
    assert 128 <= source.reads <= 128 + 2 * 128 + 3 * 64  # the batch, two ahead, and a piece a thread


@pytest.mark.parametrize("settings, message", [
    ({"batch_size": 41}, r"data.batch_size=41 is larger than the training data \(40 pictures\)"),
    ({"batch_size": 13, "process_count": 2}, r"data.batch_size=13 must be a positive multiple .* processes \(2\)"),
    ({"batch_size": 0}, "data.batch_size=0 must be a positive multiple"),
])  # fmt: skip
def test_batch_sizes_that_cannot_be_are_refused_at_once(batches, settings, message):
    with pytest.raises(UserError, match=message):
        batches(0, **settings)


def test_an_evaluation_batch_that_processes_cannot_share_is_refused_at_once(make_config):
    config = make_config(name="synthetic")
    source = make_source(config, "eval", SIZE, 3)
    with pytest.raises(UserError, match="evaluate.batch_size=10 must be a positive multiple"):
        make_eval_batches(source, config, 10, SIZE, 3, (0, 3))


def test_the_device_is_always_given_size_batches_ahead():
    given = []
    stream = DeviceBatches((given.append(batch) or batch * 10 for batch in range(6)), 2, None, {})
    seen = []
    for batch in stream:
        seen.append((batch, len(given)))
    assert seen == [(0, 3), (10, 4), (20, 5), (30, 6), (40, 6), (50, 6)]
    assert list(DeviceBatches(iter(range(3)), 0, None, {})) == [0, 1, 2]


PROGRAM = """
import sys
from absl import app
from configs.common import get_config
from mae_jax.data.loader import make_train_batches
from mae_jax.data.sources import make_source

def main(argv):
    data = get_config().data
    data.name, data.batch_size, data.num_workers = "synthetic", 8, 1
    batches = make_train_batches(make_source(data, "train", (8, 8), 3), data, (8, 8), 3)
    next(batches)
    import multiprocessing
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.read()  # for ever

if __name__ == "__main__":
    app.run(main)
"""


class Stalled:
    """A source whose pictures are read from a pipe into which nobody writes, as from a disk that does not answer."""

    num_classes, class_names, in_memory, picture_size = 1, None, False, None

    def __init__(self, pipe):
        self.pipe = pipe
        os.mkfifo(pipe)

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.pipe.read_bytes()
        raise BadImage("it is not a picture")

    def name_of(self, index):
        return "pipe"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_disk_that_does_not_answer(make_config, tmp_path, number):
    source = Stalled(tmp_path / "pipe")
    batches = make_train_batches(source, make_config(batch_size=4), SIZE, 3)
    start = time.monotonic()
    with StopSignal() as stop, pytest.raises(Stopped), stop.deferred(), stop.waiting():
        threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
        next(batches)
    batches.close()
    assert time.monotonic() - start < 5 and stop.received == number
    for thread in threading.enumerate():  # or the tests would not end
        while thread.name.startswith("reader") and thread.is_alive():
            os.close(os.open(source.pipe, os.O_RDWR))
            thread.join(0.01)


@pytest.mark.slow
def test_worker_processes_end_when_the_program_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert workers and all(is_running(pid) for pid in workers)
    program.kill()
    program.wait()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)


TO_THE_END = """
import signal
from absl import app
from configs.common import get_config
from mae_jax.data.loader import make_eval_batches, make_train_batches
from mae_jax.data.sources import make_source

def main(argv):
    signal.signal(signal.SIGTERM, lambda *_: None)
    print("starts", flush=True)
    data = get_config().data
    data.name, data.num_examples, data.batch_size, data.num_workers = "synthetic", 128, 32, 1
    source = make_source(data, "train", (96, 96), 3)  # pieces large enough to be shared
    batches = make_train_batches(source, data, (96, 96), 3)
    next(batches)
    print("reads", flush=True)
    batches.close()
    print(len(list(make_eval_batches(source, data, 32, (96, 96), 3))), flush=True)

if __name__ == "__main__":
    app.run(main)
"""


@pytest.mark.slow
def test_worker_processes_outlive_signals_to_all_and_leave_nothing_shared_when_they_end(tmp_path):
    (tmp_path / "program.py").write_text(TO_THE_END)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.Popen([sys.executable, tmp_path / "program.py"], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    assert program.stdout.readline() == "starts\n"
    stop = threading.Event()

    def send():
        while not stop.wait(0.1):
            os.killpg(program.pid, signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    try:
        assert program.stdout.readline() == "reads\n"
        stop.set()
        out, errors = program.communicate(timeout=120)
    finally:
        stop.set()
        program.kill()
    assert (out, errors, program.returncode) == ("4\n", "", 0)  # no "leaked shared_memory objects"


def end(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.slow
def test_a_reader_process_that_is_killed_ends_the_run_in_one_line():
    calls = call_ahead(end, 5, workers=1, threads=1, ahead=1)
    assert next(calls) == 0
    with pytest.raises(UserError, match="data.num_workers=1: a reader process has died.*data.num_workers=0"):
        list(calls)


def test_what_the_system_refuses_to_reader_processes_is_one_line(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(workers, "ProcessPoolExecutor", refuse)
    with pytest.raises(
        UserError, match="data.num_workers=2: a reader process .* cannot be started.*Resource.*num_workers=0"
    ):
        list(call_ahead(end, 5, workers=2, threads=1, ahead=2))


@pytest.mark.parametrize("count, threads, ahead", [(20, 3, 4), (2, 3, 0), (5, 1, 0)])
def test_calls_come_in_order_and_once_each(count, threads, ahead):
    assert list(call_ahead(abs, count, workers=0, threads=threads, ahead=ahead)) == list(range(count))


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a dead process whose new parent has not asked for its exit code yet
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return not Path("/proc").exists()
