"""Memory that was freed is kept for the next step."""

import ctypes
import platform
import subprocess
import sys

import pytest

from mae_jax.allocator import keep_freed_memory

# Page faults of an array of 64 MiB that is made, filled and freed for the second time.
PROGRAM = """
import resource, threading
import numpy as np
from mae_jax.allocator import keep_freed_memory

def fill():
    np.ones(64 << 20, np.uint8)

def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_thread():  # JAX computes in threads
    thread = threading.Thread(target=fill)
    thread.start()
    thread.join()

if {keeps}:
    assert keep_freed_memory()
fill(), in_thread()
print(faults(fill), faults(in_thread))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_an_array_that_is_made_again_faults_no_pages_in_any_thread():
    def count(keeps):
        program = PROGRAM.format(keeps=keeps)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return [int(number) for number in done.stdout.split()]

    pages = (64 << 20) // 4096
    assert max(count(True)) < pages / 100  # a thread's own stack and such
    assert min(count(False)) > pages / 600  # also if the kernel gives pages of 2 MiB


def test_where_the_c_library_has_no_such_setting_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
