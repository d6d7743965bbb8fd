"""Lines for a person: names in them are escaped, and nothing that becomes of the output ends the program."""

import io
import logging
import os
import sys

import pytest

from mae_jax.runtime import console
from mae_jax.runtime.console import say
from tests.full_disk import fill, small_disk
from tests.runs import TINY, read_json, start


def test_each_argument_is_a_line_whatever_names_are_in_it(capsys):
    say("  images    \x1b[2J/\u202e", "a class\nof two lines", "ü")
    assert capsys.readouterr().out == "  images    \\x1b[2J/\\u202e\na class\\nof two lines\nü\n"


def text_file(descriptor):
    return io.TextIOWrapper(io.BufferedWriter(console._Unfailing(descriptor)), "ascii", errors="backslashreplace")


def test_output_whose_reader_has_gone_takes_whatever_is_written():
    reading, writing = os.pipe()
    os.close(reading)
    file = text_file(writing)
    for _ in range(3):
        file.write("line\n" * 10**5)
        file.flush()
    file.close()
    os.close(writing)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_on_a_full_device_takes_whatever_is_written():
    descriptor = os.open("/dev/full", os.O_WRONLY)
    print("line", file=text_file(descriptor), flush=True)
    os.close(descriptor)


def test_what_a_full_disk_did_not_take_is_written_before_what_follows_when_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk", "100k"), open(tmp_path / "disk" / "log", "wb") as target:
        file = text_file(target.fileno())
        fill(tmp_path / "disk" / "filler")
        print("ä", "a" * 20_000, file=file, flush=True)
        (tmp_path / "disk" / "filler").unlink()
        print("two", file=file, flush=True)
        assert (tmp_path / "disk" / "log").read_text() == "\\xe4 " + "a" * 20_000 + "\ntwo\n"


def test_output_that_may_not_be_waited_for_is_written_with_what_follows():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    file, found = text_file(writing), b""
    print("a" * 100_000, file=file, flush=True)
    while len(found) < 100_001 - 2**16:
        found += os.read(reading, 2**20)
    print("end", file=file, flush=True)
    assert (found + os.read(reading, 2**20)).endswith(b"aaa\nend\n")


def test_logs_of_libraries_follow_the_streams(monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # set back at the end
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    own, other = logging.StreamHandler(sys.stderr), logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [own, other, logging.NullHandler()])
    console.keep_streams()
    assert own.stream is sys.stderr and isinstance(other.stream, io.StringIO)
    assert sys.stdout.fileno() == 1 and sys.stderr.fileno() == 2


@pytest.mark.slow
def test_a_run_whose_errors_are_closed_and_whose_output_nobody_reads_trains_and_ends_with_code_0(tmp_path):
    steps = ("--config.train.steps=2", "--config.evaluate.linear_probe=False", f"--workdir={tmp_path}")
    process = start(*TINY, *steps, under=("sh", "-c", 'exec "$@" 2>&-', "sh"))
    process.stdout.close()
    assert process.wait() == 0
    assert read_json(tmp_path / "result.json")["step"] == 2
